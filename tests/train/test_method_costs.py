"""Tests of fastrobust.train.methods: what a step costs, what it leaves alone, and the traps of the algorithms."""

import pytest
import torch
import torch.nn.functional as F
from method_steps import (
    EPSILON,
    Counted,
    Slow,
    close,
    into_ball_and_box,
    into_box,
    make_batch,
    make_learner,
    make_model,
    noise,
    per_pixel,
    section,
    shapes_of,
    sign,
    step,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastrobust.attack.threat import Threat
from fastrobust.train.learner import Learner
from fastrobust.train.methods.base import Inputs
from fastrobust.train.methods.fgsm import fgsm
from fastrobust.train.methods.free import free
from fastrobust.train.optimizers import Sgd

# ---- how many passes, and what they cost


@pytest.mark.parametrize(
    ("name", "keys", "passes", "updates"),
    [
        ("standard", {}, 1, 1),
        ("fgsm", {}, 2, 1),
        ("n_fgsm", {}, 2, 1),
        ("pgd", {"steps": 5, "alpha": 0.02}, 6, 1),
        ("free", {"replays": 4}, 4, 4),
        ("n_aaer", {}, 2, 1),
        ("sora", {}, 2, 1),
        ("fgsm_uap", {"stop_gradient": True}, 2, 1),
        ("class_uap", {"stop_gradient": True}, 2, 1),
        ("fgsm_pgi", {"stop_gradient": True}, 2, 1),
        ("awp", {"of": {"name": "fgsm"}}, 3, 1),
        ("awp", {"of": {"name": "free", "replays": 2}}, 4, 2),
        ("fgsm_uap", {}, (2, 3), 1),  # the start's logits are differentiated twice
        ("fgsm_pgi", {}, (2, 3), 1),
        ("rs_cs", {}, (2, 3), 1),
        ("liet", {"stop_gradient": True}, 3, 1),  # one is for the grey images of some classes
        ("liet", {}, (3, 4), 1),
        ("trades", {"steps": 3}, (6, 5), 1),
        ("gradalign", {}, (3, 4), 1),
    ],
)
def test_number_of_passes(name, keys, passes, updates):
    """Trap of `free`: it is only free if one backward pass serves both the weights and delta."""
    model, method, (x, y) = Counted(make_model()), section(name, **keys), make_batch()
    learner = make_learner(model)
    method.step(learner, Inputs(x, y, torch.arange(len(x))), Threat(EPSILON), 1.0, method.state(shapes_of(x)))
    passes = passes if isinstance(passes, tuple) else (passes, passes)
    assert (model.forwards, model.backwards, learner.updates.item()) == (*passes, updates)


@pytest.mark.parametrize("name", ["fgsm", "n_fgsm", "pgd", "free"])
def test_the_model_only_ever_sees_pixels_in_the_box(name):
    model = Counted(make_model())
    keys = {"steps": 3, "alpha": 0.05} if name == "pgd" else {}
    x, y = make_batch(20)
    step(name, **keys)(make_learner(model), x, y, torch.full_like(x, 0.1))
    for seen in model.inputs:
        assert seen.min() >= 0 and seen.max() <= 1
    assert any(not torch.equal(seen, x) for seen in model.inputs)


@pytest.mark.parametrize("name", ["fgsm", "n_fgsm", "pgd"])
def test_the_weights_learn_from_the_final_perturbation(name):
    """That is one step further than the point of the last gradient."""
    model, (x, y), alpha = Counted(make_model()), make_batch(), 0.05
    step(name, alpha=alpha, **({"steps": 3} if name == "pgd" else {}))(make_learner(model), x, y, torch.zeros_like(x))
    *_, last, trained = model.inputs
    gradient, _ = Slow(make_model()).attack_gradient(x, y, last - x)
    clip = into_box if name == "n_fgsm" else into_ball_and_box
    close(trained, x + per_pixel(lambda d, g, p: clip(d + alpha * sign(g), p), last - x, gradient, x))
    assert (trained - last).abs().mean() > alpha / 4


CONVNET = [(3, 16), (16, 16), (16, 32), (32, 32)]


class ConvNet(nn.Module):
    """FlopCounterMode's module hooks refuse inputs that are leaves under autograd.grad: no hook sees this module, and
    its children see x + 0."""

    def __init__(self):
        super().__init__()
        layers = []
        for inputs, outputs in CONVNET:
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

    def __call__(self, x: Tensor) -> Tensor:
        return self.network(x + 0)


def flops(action) -> int:
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def test_the_attack_computes_no_weight_gradients():
    """Forward, input gradients, weight gradients: F each (the update needs no gradient of the first layer's input, f).
    Standard 3F - f; FGSM 2F more; a version with weight gradients in its attack 3F more."""
    n, side = 4, 8
    layers = [2 * n * side * side * 9 * a * b for a, b in CONVNET] + [2 * n * 32 * 10]
    forward, first = sum(layers), layers[0]
    x, y = torch.rand(n, 3, side, side), torch.randint(10, (n,))
    learner = make_learner(ConvNet())
    standard = flops(lambda: step("standard")(learner, x, y, x))
    fgsm = flops(lambda: step("fgsm")(learner, x, y, x))

    def wasteful():
        leaf = torch.zeros_like(x).requires_grad_()
        F.cross_entropy(learner.model(x + leaf), y).backward()
        learner.update(x + EPSILON * leaf.grad.sign(), y)

    assert standard == 3 * forward - first
    assert fgsm - standard == 2 * forward
    assert 1.5 < fgsm / standard < 1.72
    assert flops(wasteful) / standard > 1.95
    pgd = flops(lambda: step("pgd", steps=3, alpha=0.05)(learner, x, y, x))
    assert pgd - standard == 3 * 2 * forward
    free = flops(lambda: step("free", replays=2)(learner, x, y, x))
    assert free == 2 * 3 * forward


@pytest.mark.parametrize(
    ("name", "keys", "units"),
    [
        ("fgsm_uap", {}, 7),
        ("fgsm_uap", {"stop_gradient": True}, 5),
        ("class_uap", {}, 7),
        ("liet", {}, 7),
        ("liet", {"stop_gradient": True}, 5),
        ("fgsm_pgi", {}, 7),
        ("fgsm_pgi", {"stop_gradient": True}, 5),
        ("trades", {"steps": 4}, 2 * 4 + 7),
        ("n_aaer", {}, 5),
        ("rs_cs", {}, 7),
        ("gradalign", {}, 11),
        ("sora", {}, 5),
        ("awp", {"of": {"name": "fgsm"}}, 5 + 3),
        ("awp", {"of": {"name": "trades", "steps": 1}}, 2 + 7 + 6),
    ],
)
def test_the_work_of_the_newer_methods(name, keys, units):
    """In forward passes, as docs/methods.md has it, to what the first layer's input and the grey images of LIET cost."""
    n, side = 20, 8
    forward = sum(2 * n * side * side * 9 * a * b for a, b in CONVNET) + 2 * n * 32 * 10
    method, x, y = section(name, **keys), torch.rand(n, 3, side, side), torch.randint(10, (n,))
    state = method.state(shapes_of(x)._replace(classes=10))
    spent = flops(lambda: method.step(make_learner(ConvNet()), Inputs(x, y, torch.arange(n)), Threat(EPSILON), 1.0, state))
    assert spent / forward == pytest.approx(units, abs=0.25), spent / forward


def test_input_gradient_leaves_weight_gradients_alone():
    model = make_model()
    model[3].bias.requires_grad_(False)
    learner = make_learner(model)
    x, y = make_batch()
    learner.input_gradient(x, y)
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False, True, True]
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0) if p.requires_grad else None
    learner.input_gradient(x, y)
    assert all((p.grad == 7).all() for p in model.parameters() if p.requires_grad)
    assert x.grad is None and not x.requires_grad


def test_weights_ask_for_gradients_again_after_a_failed_attack():
    model = make_model()
    with pytest.raises(RuntimeError):  # 5 channels where there must be 2
        make_learner(model).input_gradient(torch.rand(2, 5, 6, 6), torch.tensor([0, 1]))
    assert all(p.requires_grad for p in model.parameters())


def test_deltas_are_cut_from_the_graph():
    learner = make_learner(make_model())
    x, y = make_batch()
    for name, keys in [("fgsm", {}), ("n_fgsm", {}), ("pgd", {"alpha": 0.02, "steps": 2}), ("free", {"replays": 2})]:
        delta = step(name, **keys)(learner, x, y, torch.zeros_like(x))
        assert not delta.requires_grad and delta.shape == x.shape, name


# ---- traps


class Linear(nn.Module):
    """logits = W x, with no weight near zero: every pixel has a gradient."""

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.rand(3, 72, generator=generator) + 0.1
        weight = weight * torch.randint(0, 2, weight.shape, generator=generator).mul(2).sub(1)
        self.weight = nn.Parameter(weight * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def test_saturated_pixels_have_a_gradient_and_move_inwards():
    """Trap 5: a clamp inside the differentiated graph gives the pixels whose noise points outwards no gradient."""
    model = Linear()
    x = torch.randint(0, 2, (40, 2, 6, 6), generator=torch.Generator().manual_seed(1)).float()
    y = torch.arange(40) % 3
    probabilities = model(x).softmax(1)
    exact = ((probabilities - F.one_hot(y, 3)) @ model.weight / 40).view_as(x).detach()
    gradient, _ = make_learner(model).input_gradient(x, y)
    torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-8)
    assert (gradient != 0).all()

    inwards = exact.sign() == 1 - 2 * x  # where the loss rises towards the inside
    found = step("fgsm", init="zero", alpha=0.08)(make_learner(Linear()), x, y, torch.zeros_like(x))
    close(found, torch.where(inwards, 0.08 * exact.sign(), torch.zeros_like(x)))
    assert 0.3 < inwards.float().mean() < 0.7
    torch.manual_seed(2)
    found = step("fgsm", alpha=0.08)(make_learner(Linear()), x, y, torch.zeros_like(x))
    torch.manual_seed(2)
    raw = (2 * torch.rand_like(x) - 1) * EPSILON
    moved = inwards & (found.abs() >= 0.08 - 1e-6)
    assert moved.sum() > 0.99 * inwards.sum()  # the gradient at x + noise has the same sign but for a few

    leaf = raw.clone().requires_grad_()  # the published way, to see that the trap is there
    F.cross_entropy(model(torch.clamp(x + leaf, 0, 1)), y).backward()
    outwards = raw.sign() == 2 * x - 1
    assert (leaf.grad[outwards] == 0).all() and outwards.float().mean() > 0.4


class Hill(nn.Module):
    """Two classes, logits 0 and -20 (x - 0.5)^2 summed over the pixels: for class 0 the loss rises towards x = 0.5."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        hill = -20 * (x.flatten(1) - 0.5).square().sum(1) + self.offset
        return torch.stack([torch.zeros_like(hill), hill], 1)


@pytest.mark.parametrize(("steps", "end"), [(1, 0.15), (2, 0.0), (3, 0.15), (4, 0.0)])
def test_pgd_gradients_are_fresh_in_every_step(steps, end):
    """Trap 6. From x = 0.4 the first step leads over the top, to 0.55, where the gradient has the other sign and half
    the size: fresh gradients lead back, accumulated ones on to 0.7."""
    x = torch.full((1, 1, 1, 1), 0.4)
    learner = Learner(Hill(), Sgd(name="sgd"), torch.zeros(4))
    pgd = step("pgd", epsilon=0.3, alpha=0.15, steps=steps, init="zero")
    close(pgd(learner, x, torch.tensor([0]), torch.zeros_like(x)), torch.full_like(x, end))


def test_input_gradient_does_not_accumulate():
    learner = make_learner(make_model())
    x, y = make_batch()
    first, _ = learner.input_gradient(x, y)
    again, _ = learner.input_gradient(x, y)
    assert torch.equal(first, again) and first.abs().sum() > 0


def test_skip_misclassified_leaves_wrong_examples_at_their_start():
    """A model that calls everything class 0: examples of the other classes do not move, unless skipping is off."""

    class Zero(Linear):
        def forward(self, x):
            return super().forward(x) * 0.01 + torch.tensor([5.0, 0.0, 0.0])

    x = torch.full((6, 2, 6, 6), 0.5)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    torch.manual_seed(3)
    found = step("pgd", steps=4, alpha=0.05, skip_misclassified=True)(make_learner(Zero()), x, y, torch.zeros_like(x))
    torch.manual_seed(3)
    begin = noise(x, EPSILON)
    close(found[y != 0], begin[y != 0])
    close(found[y == 0].abs(), torch.full_like(found[y == 0], EPSILON))
    moved = step("pgd", steps=4, alpha=0.05)(make_learner(Zero()), x, y, torch.zeros_like(x))
    close(moved.abs(), torch.full_like(moved, EPSILON))


def test_random_starts_differ_from_step_to_step():
    torch.manual_seed(4)
    x, y = make_batch()
    fgsm = step("fgsm", alpha=0.0)
    learner = make_learner(make_model())
    assert not torch.equal(fgsm(learner, x, y, x), fgsm(learner, x, y, x))


PREVIOUS = {"init": "previous"}
METHODS = [("standard", {}), ("fgsm", {}), ("fgsm", PREVIOUS), ("n_fgsm", {}), ("pgd", {"alpha": 0.02}), ("free", {})]


@pytest.mark.parametrize(("name", "keys"), METHODS)
def test_images_and_labels_are_not_written_to(name, keys):
    x, y = make_batch()
    copies = x.clone(), y.clone()
    step(name, **keys)(make_learner(make_model()), x, y, torch.full_like(x, 0.03))
    assert torch.equal(x, copies[0]) and torch.equal(y, copies[1])


@pytest.mark.parametrize(("name", "keys"), METHODS)
def test_what_a_method_keeps_is_zero_at_first_and_written_in_place(name, keys):
    """In place, so that a recorded step reads what the one before wrote."""
    method, (x, y) = section(name, **keys), make_batch()
    state = method.state(shapes_of(x))
    assert list(state) == (["delta"] if name == "free" or "init" in keys else [])
    assert set(state) <= set(method.by_slot)
    for kept in state.values():
        assert kept.shape == x.shape and (kept == 0).all() and kept.is_contiguous(memory_format=torch.channels_last)
    before = {key: kept.data_ptr() for key, kept in state.items()}
    method.step(make_learner(make_model()), Inputs(x, y, torch.arange(len(x))), Threat(EPSILON), 1.0, state)
    assert {key: kept.data_ptr() for key, kept in state.items()} == before
    assert all((kept != 0).any() for kept in state.values())


def test_algorithms_do_not_write_to_the_delta_that_they_are_given():
    x, y = make_batch()
    kept = torch.full_like(x, 0.03)
    moved = fgsm(make_learner(make_model()), x, y, kept, threat=Threat(EPSILON), alpha=0.1, init="previous")
    replayed = free(make_learner(make_model()), x, y, kept, threat=Threat(EPSILON), replays=2)
    assert (kept == 0.03).all() and not torch.equal(moved, kept) and not torch.equal(replayed, kept)


@pytest.mark.parametrize("clip_start", [True, False])
def test_where_the_gradient_of_a_random_start_is_taken(clip_start):
    """Images of zeros: without clip_start half of the points lie below the pixel box; what is trained on never does."""
    seen = []

    class Recorder:
        def attack_gradient(self, x, y):
            seen.append(x)
            return torch.ones_like(x), torch.zeros(len(x), 2)

        def update(self, x, y):
            seen.append(x)

    x = torch.zeros(4, 1, 10, 10)
    ball = Threat(0.3)
    delta = fgsm(Recorder(), x, torch.zeros(4), None, threat=ball, alpha=0.1, init="random", clip_start=clip_start)
    below = (seen[0] < 0).float().mean().item()
    assert below == 0 if clip_start else 0.35 < below < 0.65
    assert seen[0].abs().max() <= 0.3
    assert seen[1].min() >= 0 and torch.equal(seen[1], delta) and delta.max() <= 0.3
