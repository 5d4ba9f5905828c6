"""Tests of fastrobust.train.interval_bounds: bounds against sampled points, closed forms and intervals written out; what
training with them does; and what it refuses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import bar_images
from torch import Tensor, nn

from fastrobust.attack import threat
from fastrobust.models import Normalized, create
from fastrobust.runtime.errors import ConfigError
from fastrobust.train import interval_bounds
from fastrobust.train.learner import Learner
from fastrobust.train.methods.fgsm import fgsm
from fastrobust.train.optimizers import Adam
from fastrobust.verification.lowering import lower_model


def network(seed: int, scale: float = 1.0) -> Normalized:
    """2 x 5 x 5 images -> 3 classes, one layer of each kind, a bias left out, and sequences within a sequence."""
    torch.manual_seed(seed)
    front = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1, groups=2), nn.ReLU(), nn.Conv2d(4, 6, 2, bias=False))
    back = [nn.Flatten(), nn.ReLU(), nn.Linear(24, 7, bias=False), nn.ReLU(), nn.Linear(7, 3)]
    model = Normalized(nn.Sequential(front, *back), (0.4, 0.6), (0.3, 0.5))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return model


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Some pixels are saturated."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(count, 2, 5, 5, generator=generator) * 1.4 - 0.2).clamp(0, 1)
    return x, torch.randint(3, (count,), generator=generator)


def differences(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    return logits - logits.gather(1, y[:, None])


def with_norms(seed: int, pooling: bool) -> Normalized:
    """The same with BatchNorm, and with pooling if wanted, in training mode, after some batches."""
    torch.manual_seed(seed)
    pools = [nn.AvgPool2d(2, 1), nn.AdaptiveAvgPool2d(3)] if pooling else [nn.Identity(), nn.Identity()]
    front = [nn.Conv2d(2, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(), pools[0], nn.Conv2d(4, 5, 2 if pooling else 3)]
    back = [nn.BatchNorm2d(5), nn.ReLU(), pools[1], nn.Flatten(), nn.Linear(45, 6)]
    model = Normalized(nn.Sequential(*front, *back, nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)), (0.4, 0.6), (0.3, 0.5))
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
                norm.weight.uniform_(-2, 2)
                norm.bias.normal_()
        for batch in range(5):
            model(images(30, batch)[0])
    return model


@pytest.mark.parametrize(("seed", "pooling"), [(0, False), (1, False), (2, True)])
@torch.no_grad()
def test_bounds_through_batchnorm_are_the_intervals_of_the_network_in_evaluation(seed, pooling):
    """Against the verifier's, which are tighter where layers without a ReLU between them are one matrix, and against
    points; the averages stay as they are."""
    model, (x, y) = with_norms(seed, pooling).double(), images(4, seed)
    x = x.double()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    lower, upper = threat.box(x, 0.05)
    bound = interval_bounds.worst_differences(model, lower, upper, y)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()) and model.training
    network = lower_model(model, (2, 5, 5))
    for i in range(4):
        ends = [(lower[i].flatten().numpy(), upper[i].flatten().numpy())]
        for relu in network.relus:
            ends.append(tuple(side.clip(min=0) for side in relu.interval(ends)))
        classes = np.eye(3)
        high = network.outputs.rows(classes - classes[y[i]]).interval(ends)[1]
        slack = bound[i] - torch.from_numpy(high)
        assert (slack > -1e-6).all() and (pooling or (slack < 1e-6).all())
    torch.manual_seed(seed)
    model.eval()
    for _ in range(20):
        points = lower + (upper - lower) * torch.rand(x.shape).round()
        assert (differences(model, points, y) <= bound + 1e-12).all()


@pytest.mark.parametrize("epsilon", [0.03, 0.3])
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_no_point_of_the_box_is_worse(seed, epsilon):
    """10,000 points of each of 8 boxes, half of them corners."""
    model, (x, y) = network(seed, 2.0).double(), images(8, seed)
    x = x.double()
    lower, upper = threat.box(x, epsilon)
    bound = interval_bounds.worst_differences(model, lower, upper, y)
    assert bound.shape == (8, 3) and (bound.gather(1, y[:, None]) == 0).all()
    torch.manual_seed(seed)
    largest = torch.full_like(bound, -torch.inf)
    for part in range(10):
        mix = torch.rand(1000, *x.shape, dtype=x.dtype)
        mix = mix.round() if part % 2 else mix
        points = torch.lerp(lower, upper, mix)
        found = differences(model, points.flatten(0, 1), y.repeat(1000)).reshape(1000, 8, 3)
        loss = F.cross_entropy(found.flatten(0, 1), y.repeat(1000), reduction="none").reshape(1000, 8)
        assert (loss <= F.cross_entropy(bound, y, reduction="none") + 1e-12).all()
        largest = torch.maximum(largest, found.amax(0))
    assert (largest <= bound + 1e-12).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_bounds_are_intervals_written_out_number_by_number(seed):
    """Every layer as the matrix that it is; every sum over its positive and its negative weights in turn."""
    model, (x, y) = network(seed).double(), images(3, seed)
    lower, upper = threat.box(x.double(), 0.1)
    found = interval_bounds.worst_differences(model, lower, upper, y)
    layers = [m for m in model.network.modules() if not list(m.children())]
    for i in range(len(x)):
        low, high = ((side[i] - model.mean) / model.std for side in (lower, upper))
        for layer in layers[:-1]:
            if isinstance(layer, nn.Flatten):
                low, high = low.flatten(), high.flatten()
            elif isinstance(layer, nn.ReLU):
                low, high = low.clamp(min=0), high.clamp(min=0)
            else:
                shift = layer(torch.zeros(1, *low.shape, dtype=low.dtype))[0]
                units = torch.eye(low.numel(), dtype=low.dtype).reshape(-1, *low.shape)
                columns = (layer(units) - shift).flatten(1)  # one for each input
                ends = []
                for a, b in ((low.flatten(), high.flatten()), (high.flatten(), low.flatten())):
                    ends.append((columns.clamp(min=0).T @ a + columns.clamp(max=0).T @ b).reshape(shift.shape) + shift)
                low, high = ends
        last = layers[-1]
        for k in range(3):
            expected = (last.bias[k] - last.bias[y[i]]).item()
            for f in range(7):
                weight = (last.weight[k, f] - last.weight[y[i], f]).item()
                expected += weight * (high[f] if weight > 0 else low[f]).item()
            assert found[i, k].item() == pytest.approx(expected, abs=1e-9)


def test_without_hidden_layers_the_bound_is_reached_at_a_corner():
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(50, 4)), images(5)
    lower, upper = threat.box(x, 0.2)
    found = interval_bounds.worst_differences(model, lower, upper, y)
    for i, k in itertools.product(range(5), range(4)):
        weight = (model[1].weight[k] - model[1].weight[y[i]]).reshape(x[i].shape)
        corner = torch.where(weight > 0, upper[i], lower[i])
        torch.testing.assert_close(found[i, k], differences(model, corner[None], y[i : i + 1])[0, k])


def test_a_box_of_one_point_gives_that_points_differences():
    model, (x, y) = network(1), images(6)
    torch.testing.assert_close(interval_bounds.worst_differences(model, x, x, y), differences(model, x, y))


def test_a_box_within_a_box_has_no_larger_bounds():
    model, (x, y) = network(2), images(6)
    small, large = (interval_bounds.worst_differences(model, *threat.box(x, epsilon), y) for epsilon in (0.05, 0.06))
    assert (small <= large).all() and (small < large).sum() == 12  # all but the labels' own zeros


def test_the_gradient_is_that_of_small_changes():
    """Of every weight of every layer, in double precision."""
    model, (x, y) = network(3).double(), images(4)
    lower, upper = threat.box(x.double(), 0.05)
    loss = lambda: F.cross_entropy(interval_bounds.worst_differences(model, lower, upper, y), y)
    found = torch.autograd.grad(loss(), list(model.parameters()))
    for p, gradient in zip(model.parameters(), found, strict=True):
        assert gradient.abs().sum() > 0
        for place in range(0, p.numel(), max(1, p.numel() // 7)):
            sides = []
            for change in (1e-6, -2e-6):
                with torch.no_grad():
                    p.view(-1)[place] += change
                    sides.append(loss().item())
            with torch.no_grad():
                p.view(-1)[place] += 1e-6
            assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(gradient.view(-1)[place].item(), abs=1e-6)


def test_what_is_trained_with_the_bound_is_proved_by_it():
    """FGSM on 400 bars, 60 updates, epsilon growing to 0.05: with a tenth of the loss on the bound most of 200 other images
    are proved by intervals alone, without it none is; accuracy does not suffer."""
    pixels, labels = bar_images(600, seed=0)
    x, y = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().mean(1, keepdim=True) / 255, torch.from_numpy(labels)
    proved, accuracy = [], []
    for weight in (0.0, 0.1):
        torch.manual_seed(0)
        model = create("mnist_net", channels=1, classes=10, mean=(0.0,), std=(1.0,))
        learner = Learner(model.train(), Adam(name="adam"), torch.full((60,), 5e-3))
        for i in range(60):
            batch, epsilon = slice(i % 4 * 100, i % 4 * 100 + 100), 0.05 * min(1, i / 36)
            start = torch.zeros_like(x[batch])
            ball = threat.Threat(epsilon)
            fgsm(learner, x[batch], y[batch], start, threat=ball, alpha=1.25 * epsilon, ibp_weight=weight)
        with torch.no_grad():
            worst = interval_bounds.worst_differences(model, *threat.box(x[400:], 0.05), y[400:])
            proved.append((worst.scatter(1, y[400:, None], -torch.inf).amax(1) < 0).float().mean().item())
            accuracy.append((model(x[400:]).argmax(1) == y[400:]).float().mean().item())
    assert proved[0] == 0 and proved[1] > 0.5, (proved, accuracy)
    assert min(accuracy) > 0.97, accuracy


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ([nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)], "GroupNorm"),
        ([nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(75, 3)], "Conv2d"),
        ([nn.Conv2d(2, 3, 5), nn.Flatten()], "Flatten"),
    ],
)
def test_other_layers_are_refused_by_name(layers, named):
    x, y = images(2)
    with pytest.raises(ConfigError, match=f"method.ibp_weight.*{named}.*mnist_net"):
        interval_bounds.worst_differences(nn.Sequential(*layers), x, x, y)


def test_a_run_with_another_model_is_refused_before_it_begins(config_of, begin):
    with pytest.raises(ConfigError, match=r"method\.ibp_weight.*PreActResNet18"):
        begin(config_of(method={"name": "fgsm", "ibp_weight": 0.1}, model__name="preact_resnet18_w16"))
