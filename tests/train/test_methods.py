"""Tests of fastrobust.train.methods: each training step against the same step written out slowly (`method_steps.Slow`)."""

import pytest
import torch
import torch.nn.functional as F
from method_steps import (
    EPSILON,
    Counted,
    Slow,
    as_function,
    close,
    into_ball_and_box,
    into_box,
    make_batch,
    make_learner,
    make_model,
    noise,
    per_pixel,
    same_weights,
    section,
    sign,
    step,
    written_out_bound,
)

from fastrobust.attack.threat import Threat

# ---- each method against its slow version


def test_standard():
    model, reference = make_model(), Slow(make_model())
    x, y = make_batch()
    learner = make_learner(model)
    for _ in range(3):
        assert (step("standard")(learner, x, y, x) == 0).all()
        reference.update(x, y)
    same_weights(model, reference.model)


@pytest.mark.parametrize("init", ["zero", "random", "previous"])
@pytest.mark.parametrize("alpha", [0.04, 0.125])
def test_fgsm(init, alpha):
    model, reference = make_model(), Slow(make_model())
    learner = make_learner(model)
    x, y = make_batch()
    kept = 0.3 * (torch.rand(x.shape, generator=torch.Generator().manual_seed(9)) - 0.5)  # partly outside ball and box
    torch.manual_seed(5)
    found = step("fgsm", init=init, alpha=alpha)(learner, x, y, kept)

    torch.manual_seed(5)
    delta = {"zero": torch.zeros_like(x), "previous": per_pixel(into_box, kept, x)}.get(init)
    delta = noise(x, EPSILON) if delta is None else delta
    gradient, _ = reference.attack_gradient(x, y, delta)
    delta = per_pixel(lambda d, g, p: into_ball_and_box(d + alpha * sign(g), p), delta, gradient, x)
    reference.update(x + delta, y)
    close(found, delta)
    same_weights(model, reference.model)


def test_fgsm_alpha_defaults_to_five_quarters_of_epsilon():
    x = torch.full((2, 2, 6, 6), 0.5)
    for epsilon in (0.1, 0.2):
        fgsm = as_function(section("fgsm", epsilon, init="zero"), Threat(10.0))  # a ball so large that nothing is clipped
        found = fgsm(make_learner(make_model()), x, torch.tensor([0, 1]), x)
        moved = found[found != 0]
        close(moved.abs(), torch.full_like(moved, 1.25 * epsilon))
        assert len(moved) > 100


@pytest.mark.parametrize("scale", [1.0, torch.tensor(0.5)], ids=["number", "tensor"])
def test_fgsm_with_an_interval_bound(scale):
    """Its radius is that of the attack, and grows with it."""
    model, reference = make_model(), Slow(make_model())
    learner = make_learner(model)
    for seed in range(3):
        x, y = make_batch(seed=seed)
        torch.manual_seed(seed)
        step("fgsm", init="zero", alpha=0.04, ibp_weight=0.3, scale=scale)(learner, x, y, x)
        gradient, _ = reference.attack_gradient(x, y, torch.zeros_like(x))
        delta = per_pixel(lambda g, p: into_ball_and_box(0.04 * scale * sign(g), p), gradient, x)
        bound = written_out_bound(reference.model, x, EPSILON * scale)[torch.arange(len(y)), y]
        reference.update(x + delta, y, F.cross_entropy(bound, y), 0.3)
    same_weights(model, reference.model)
    assert learner.read_sums()[0] > 0 and learner.updates.item() == 3


def test_previous_starts_from_the_last_delta():
    """Over three minibatches, handing on what each step returns."""
    model, reference = make_model(), Slow(make_model())
    learner, fgsm = make_learner(model), step("fgsm", init="previous", alpha=0.06)
    found = delta = torch.zeros(6, 2, 6, 6)
    for seed in range(3):
        x, y = make_batch(seed=seed)
        found = fgsm(learner, x, y, found)
        delta = per_pixel(into_box, delta, x)
        gradient, _ = reference.attack_gradient(x, y, delta)
        delta = per_pixel(lambda d, g, p: into_ball_and_box(d + 0.06 * sign(g), p), delta, gradient, x)
        reference.update(x + delta, y)
    close(found, delta)
    same_weights(model, reference.model)
    inner = ((found.abs() - 0.06).abs() > 1e-4) & ((found.abs() - EPSILON).abs() > 1e-4) & (found != 0)
    assert inner.any()  # sums of several steps: not one step from zero


def test_n_fgsm():
    model, reference = make_model(), Slow(make_model())
    learner = make_learner(model)
    x, y = make_batch(12)
    torch.manual_seed(6)
    found = step("n_fgsm")(learner, x, y, torch.zeros_like(x))

    torch.manual_seed(6)
    delta = noise(x, 2 * EPSILON)
    gradient, _ = reference.attack_gradient(x, y, delta)
    delta = per_pixel(lambda d, g, p: into_box(d + EPSILON * sign(g), p), delta, gradient, x)
    reference.update(x + delta, y)
    close(found, delta)
    same_weights(model, reference.model)


def test_n_fgsm_is_clipped_to_the_box_but_not_to_the_ball():
    torch.manual_seed(7)
    model, (x, y) = Counted(make_model()), make_batch(60)
    found = step("n_fgsm")(make_learner(model), x, y, torch.zeros_like(x))
    assert found.abs().max() <= 3 * EPSILON + 1e-6
    assert found.abs().max() > 2.9 * EPSILON and (found.abs() > EPSILON).float().mean() > 0.3
    assert model.inputs[-1].min() >= 0 and model.inputs[-1].max() <= 1
    wide = step("n_fgsm", noise=0.5, alpha=0.01)(make_learner(make_model()), x, y, torch.zeros_like(x))
    assert 0.055 < wide.abs().max() <= 0.06 + 1e-6


@pytest.mark.parametrize("init", ["zero", "random"])
@pytest.mark.parametrize("skip", [False, True])
def test_pgd(init, skip):
    model, reference = make_model(), Slow(make_model())
    learner, pgd = make_learner(model), step("pgd", steps=3, alpha=0.04, init=init, skip_misclassified=skip)
    x, y = make_batch(16, seed=3)
    for _ in range(6):  # some examples must be right, some wrong
        standard = step("standard")
        standard(learner, x, y, x)
        reference.update(x, y)
    torch.manual_seed(8)
    found = pgd(learner, x, y, torch.zeros_like(x))

    torch.manual_seed(8)
    delta = noise(x, EPSILON) if init == "random" else torch.zeros_like(x)
    stayed = 0
    for _ in range(3):
        gradient, predicted = reference.attack_gradient(x, y, delta)
        for i in range(len(x)):
            if skip and predicted[i] != y[i]:
                stayed += 1
                continue
            delta[i] = per_pixel(lambda d, g, p: into_ball_and_box(d + 0.04 * sign(g), p), delta[i], gradient[i], x[i])
    reference.update(x + delta, y)
    assert not skip or 3 < stayed < 45
    close(found, delta)
    same_weights(model, reference.model)


def test_free_is_algorithm_2():
    """Over two minibatches: delta goes on from one replay, and one minibatch, to the next; every replay updates."""
    model, reference = make_model(), Slow(make_model())
    learner, free = make_learner(model), step("free", replays=3)
    found = delta = torch.zeros(6, 2, 6, 6)
    for seed in range(2):
        x, y = make_batch(seed=seed)
        found = free(learner, x, y, found)
        for _ in range(3):
            delta = per_pixel(into_box, delta, x)
            gradient = reference.replay(x, y, delta)
            delta = per_pixel(lambda d, g, p: into_ball_and_box(d + EPSILON * sign(g), p), delta, gradient, x)
    close(found, delta)
    same_weights(model, reference.model)
    assert learner.updates.item() == 6


def test_free_depends_on_the_delta_it_is_given():
    x, y = make_batch()
    learner = make_learner(make_model())
    other = make_learner(make_model())
    step("free", replays=1)(learner, x, y, torch.zeros_like(x))
    step("free", replays=1)(other, x, y, torch.full_like(x, 0.05))
    assert not torch.equal(learner.model[0].weight, other.model[0].weight)


@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    ("name", "keys", "smaller"),
    [
        ("fgsm", {"alpha": 0.08}, {"alpha": 0.02}),
        ("fgsm", {"init": "previous", "alpha": 0.08}, {"init": "previous", "alpha": 0.02}),
        ("n_fgsm", {}, {}),
        ("pgd", {"steps": 2, "alpha": 0.04}, {"steps": 2, "alpha": 0.01}),
        ("free", {"replays": 2}, {"replays": 2}),
        ("standard", {}, {}),
    ],
)
def test_the_scale_multiplies_epsilon_and_alpha(name, keys, smaller, scale):
    """A step at a scale of 1/4 is the step of a config with a quarter of epsilon and alpha."""
    models, found = [make_model(), make_model()], []
    x, y = make_batch()
    kept = torch.full_like(x, 0.02)
    for model, method in zip(models, [step(name, 0.1, scale, **keys), step(name, 0.025, **smaller)], strict=True):
        torch.manual_seed(11)
        found.append(method(make_learner(model), x, y, kept))
    close(found[0], found[1])
    same_weights(*models)
    assert name == "standard" or 0 < found[0].abs().max() <= 0.075 + 1e-6
