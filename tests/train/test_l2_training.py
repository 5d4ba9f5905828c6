"""Training in the L2 ball: each method's perturbation against the same written out, and a small network on Fashion-MNIST."""

from __future__ import annotations

import math

import pytest
import torch
from data_files import fashion_mnist
from method_steps import Slow, as_function, close, make_batch, make_learner, make_model, same_weights, section

from fastrobust.attack.pgd import pgd
from fastrobust.attack.threat import L2
from fastrobust.config import reading
from fastrobust.data import sets
from fastrobust.data.loaders.resident import Resident
from fastrobust.train import step
from fastrobust.train.methods.base import Inputs
from fastrobust.train.methods.fgsm import fgsm

EPSILON = 0.4


def norm(t) -> float:
    return math.sqrt(math.fsum(v * v for v in t.flatten().tolist()))


def moved(delta, gradient, alpha):
    return torch.stack([d + alpha / norm(g) * g for d, g in zip(delta, gradient, strict=True)])


def into_box(delta, x):
    return torch.minimum(torch.maximum(delta, -x), 1 - x)


def into_ball_and_box(delta, x):
    return into_box(torch.stack([d * min(1.0, EPSILON / max(norm(d), 1e-30)) for d in delta]), x)


def started(x, radius):
    torch.manual_seed(5)
    return into_box(L2(radius).start(x, clip=False), x)


def pgd_slowly(reference, x, y, delta, alpha, steps):
    for _ in range(steps):
        delta = into_ball_and_box(moved(delta, reference.attack_gradient(x, y, delta)[0], alpha), x)
    reference.update(x + delta, y)
    return delta


@pytest.mark.parametrize("scale", [1.0, torch.tensor(1.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", ["fgsm", "n_fgsm", "pgd", "free"])
def test_a_step_of_each_method(name, scale):
    model, reference = make_model(), Slow(make_model())
    x, y = make_batch()
    keys = {"pgd": {"alpha": 0.15, "steps": 3}, "free": {"replays": 2}}.get(name, {})
    torch.manual_seed(5)
    found = as_function(section(name, EPSILON, **keys), L2(EPSILON), scale)(make_learner(model), x, y, torch.zeros_like(x))
    if name == "fgsm":
        expected = pgd_slowly(reference, x, y, started(x, EPSILON), 1.25 * EPSILON, 1)
    elif name == "pgd":
        expected = pgd_slowly(reference, x, y, started(x, EPSILON), 0.15, 3)
    elif name == "n_fgsm":
        start = started(x, 2 * EPSILON)
        expected = into_box(moved(start, reference.attack_gradient(x, y, start)[0], EPSILON), x)
        reference.update(x + expected, y)
    else:
        expected = torch.zeros_like(x)
        for _ in range(2):
            expected = into_ball_and_box(moved(expected, reference.replay(x, y, expected), EPSILON), x)
    close(found, expected)
    same_weights(model, reference.model)


@pytest.mark.parametrize("name, largest", [("trades", 1), ("rs_cs", 2), ("n_aaer", 3), ("awp", 1)])
def test_newer_methods_move_images_as_far_as_their_ball_reaches(name, largest):
    """Starts and steps of these are not projected, but for trades'; a step of signs would be of length 0.4 * sqrt(72)."""
    x, y = make_batch()
    keys = {"of": {"name": "trades"}} if name == "awp" else {}
    learner, met = make_learner(make_model()), []
    usual = learner.forward
    learner.forward = lambda points, *twice: met.append(points.detach()) or usual(points, *twice)
    section(name, EPSILON, **keys).step(learner, Inputs(x, y, torch.arange(len(x))), L2(EPSILON), 1.0, state_of(name))
    lengths = [norm(d) for points in met for d in points.view(-1, *x.shape)[0] - x]
    assert 0.9 * EPSILON < max(lengths) <= largest * EPSILON + 1e-6


def state_of(name):
    return {"epoch": torch.zeros(()), "sums": torch.zeros(2), "last": torch.zeros(())} if name == "rs_cs" else {}


def test_kernels_for_linf_are_left_alone(monkeypatch):
    monkeypatch.setattr("fastrobust.attack.threat._kernels", None)
    x, gradient = make_batch()[0], torch.randn(make_batch()[0].shape)
    fused, plain = L2(EPSILON, kernels=True).scaled(1.0), L2(EPSILON)
    torch.manual_seed(0)
    start = fused.start(x)
    torch.manual_seed(0)
    assert torch.equal(start, plain.start(x))
    for project in (True, False):
        assert torch.equal(fused.climb(start, gradient, 0.3, x, project), plain.climb(start, gradient, 0.3, x, project))


def test_a_warm_up_scales_the_ball_and_the_step():
    x, y = make_batch()
    half, whole = (
        as_function(section("fgsm", e, init="zero"), L2(e), scale)(make_learner(make_model()), x, y, x)
        for e, scale in ((EPSILON / 2, 1.0), (EPSILON, torch.tensor(0.5)))
    )
    close(half, whole)


def test_interval_bounds_refuse_it_even_without_a_config():
    x, y = make_batch()
    with pytest.raises(Exception, match="L-infinity ball alone"):
        fgsm(make_learner(make_model()), x, y, None, threat=L2(EPSILON), alpha=EPSILON, ibp_weight=0.1)


def test_a_short_l2_training_is_more_robust_in_l2_than_a_standard_one():
    folder = fashion_mnist()
    train, test = (sets.load("fashion_mnist", split, folder, limit=n) for split, n in (("train", 3000), ("test", 200)))
    robust = {}
    for name in ("fgsm", "standard"):
        config = reading.parse(
            {
                "name": name,
                "norm": "l2",
                "epsilon": 1.5,
                "device": "cpu",
                "engine": "eager",
                "precision": "fp32",
                "data": {"dataset": "fashion_mnist"},
                "model": {"name": "mnist_net"},
                "method": {"name": name},
                "optimizer": {"name": "adam"},
                "schedule": {"name": "cyclic", "max_lr": 2e-3},
                "phases": [{"epochs": 2, "batch_size": 50}],
            },
            "test",
        )
        loader = Resident(train, torch.device("cpu"))
        training = step.build(config, loader, torch.device("cpu"))
        assert training.threat == L2(1.5)
        for batch in loader.batches(0, 0, 50, 0, 120):
            training(batch)
        model = training.learner.model.eval()
        found = pgd(model, test.images, test.labels, threat=L2(1.5), alpha=0.375, steps=10, restarts=1)
        robust[name] = int(found.robust.sum())
    assert robust["fgsm"] > robust["standard"] + 20, robust
