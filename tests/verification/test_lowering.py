"""Every layer that is verified, against the model itself, brute force over signs and sampled points; and what is refused."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_networks import decide, images, program, rows_at, scaled
from torch import nn

from fastrobust.models import Normalized, create
from fastrobust.runtime.errors import FastrobustError
from fastrobust.verification import branch, workers
from fastrobust.verification.decide import Decider
from fastrobust.verification.lowering import lower_model
from fastrobust.verification.reduced import TooLarge

SHAPE = (1, 4, 4)


class Residual(nn.Module):
    """Sums of what passes a layer and what passes by it, from the image on, in the words that people use."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 2, 3, 1, 1, bias=False), nn.BatchNorm2d(2)
        self.second, self.shortcut = nn.Conv2d(2, 2, 3, 2, 1), nn.Conv2d(1, 2, 1, 2)
        self.last = nn.Linear(2, 3)

    def forward(self, x):
        out = self.second(F.relu(self.norm(self.first(x)), inplace=True))
        out += self.shortcut(x)
        out = torch.relu(out) + 0.5 * F.avg_pool2d(x, 2)
        return self.last(torch.relu(1 - out).mean((2, 3)))


class Functions(nn.Module):
    """Torch's functions and methods instead of modules, and shapes that are asked for."""

    def __init__(self):
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(3, 16)), nn.Linear(9, 3)

    def forward(self, x):
        flat = ((x - 0.4) / 0.3).view(x.size(0), -1)
        h = torch.cat([flat @ self.weight.t(), 2 * flat[:, 5:8] - 0.1, F.leaky_relu(flat[:, :3], 0.2)], 1)
        return self.last(F.dropout(h.clone().relu_(), training=self.training)).reshape(x.shape[0], 3)


def flat(*layers: nn.Module, features: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 3))


KINDS = {
    "batchnorm": lambda: flat(nn.Conv2d(1, 2, 3, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), features=8),
    "average pooling": lambda: flat(
        nn.Conv2d(1, 2, 2), nn.AvgPool2d(2, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), features=8
    ),
    "residual": Residual,
    "functions": Functions,
    "padding of each side": lambda: flat(nn.ZeroPad2d((1, 0, 2, 0)), nn.Conv2d(1, 2, 3, 2), nn.ReLU(), features=8),
    "constant padding": lambda: flat(nn.ConstantPad2d(1, 0.7), nn.Conv2d(1, 2, 3, 2, (1, 0)), nn.ReLU(), features=12),
    "groups, dilation": lambda: flat(
        nn.Conv2d(1, 2, (3, 2), (1, 2), padding=(1, 0), dilation=(1, 2)),
        nn.Conv2d(2, 2, 3, 2, 1, groups=2),
        nn.ReLU(),
        features=4,
    ),
    "padding that keeps the size": lambda: flat(nn.Conv2d(1, 1, (2, 3), padding="same"), nn.ReLU(), features=16),
    "many ReLUs, one at the end": lambda: nn.Sequential(
        nn.ReLU(inplace=True),
        nn.Conv2d(1, 2, 3, 2, 1),
        nn.ReLU(),
        nn.ReLU(),
        nn.Flatten(),
        nn.ReLU(),
        nn.Linear(8, 3),
        nn.ReLU(),
    ),
    "max pooling": lambda: flat(nn.Conv2d(1, 1, 2), nn.ReLU(), nn.MaxPool2d((2, 3), (1, 3)), features=2),
    "no ReLU": lambda: flat(nn.Conv2d(1, 2, 3), nn.Dropout2d(), nn.Identity(), features=8),
    **{
        f"{mode} padding": lambda mode=mode: flat(nn.Conv2d(1, 2, 3, 2, 1, padding_mode=mode), nn.ReLU(), features=8)
        for mode in ("reflect", "replicate", "circular")
    },
}


def made(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Normalized(KINDS[kind](), (0.4,), (0.3,)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.running_mean, module.bias):
                    tensor.normal_()
                for tensor in (module.running_var, module.weight):
                    tensor.uniform_(0.5, 2)
        for p in model.parameters():
            p.mul_(1.5)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_against_the_model_brute_force_and_sampled_points(kind):
    verdicts = set()
    for seed, epsilon in ((0, 0.01), (1, 0.04), (2, 0.1), (3, 0.2)):
        model, pixels = made(kind, seed), images(1, seed, SHAPE)
        x, label = pixels[0].float() / 255, model(pixels.float() / 255).argmax()
        decider = Decider(model, SHAPE, epsilon)
        low, high = (x.double() - epsilon).clamp(0, 1).flatten(), (x.double() + epsilon).clamp(0, 1).flatten()
        unit = torch.rand(2000, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        unit[::2] = unit[::2].round()  # every second one a corner
        points = low + (high - low) * unit
        logits = model.double()(points.reshape(-1, *SHAPE)).detach()
        model.float()
        assert torch.allclose(decider.network(points), logits, rtol=0, atol=1e-10)
        others = [c for c in range(3) if c != label]
        margins = logits[:, label : label + 1] - logits[:, others]
        for steps in (0, 5):
            least, bounder, questions = decider.margins(x, label, steps)
            z = rows_at(bounder.reduced, points)
            known = [
                scaled(bounder.reduced, points),
                torch.ones(len(points), 1, dtype=torch.float64),
                *(t.relu() for t in z),
            ]
            assert torch.allclose(torch.cat(known, 1) @ questions.T, margins, rtol=0, atol=1e-9)
            inputs = torch.cat([torch.zeros(len(points), 0), *z], 1)
            assert (inputs >= bounder.reduced.lower).all() and (inputs <= bounder.reduced.upper).all()
            assert (margins >= least - 1e-9).all()
        around = bounder.reduced
        if (count := len(around.lower)) > 6:
            continue
        signs = list(itertools.product((-1, 1), repeat=count))
        exact = least.min().item()  # right if no sign is open
        if count:
            exact = min(program(around, question, pattern) for question in questions for pattern in signs)
        assert least.min() <= exact + 1e-9 and exact <= margins.min() + 1e-9
        (verdict,) = decide(decider, [0], pixels, label[None], 10)
        assert verdict.verdict == ("verified" if exact > branch.TOLERANCE else "falsified")
        if verdict.witness is not None:
            assert model(verdict.witness[None]).argmax() != label
            assert (verdict.witness.double() - x.double()).abs().max() <= epsilon
        verdicts.add(verdict.verdict)
    assert verdicts, "nothing was small enough for brute force"


def test_our_networks_are_what_they_are_lowered_to():
    for name, shape in (("mnist_net", (1, 28, 28)), ("preact_resnet18_w16", (3, 8, 8))):
        model = create(name, channels=shape[0], classes=10, mean=(0.1,) * shape[0], std=(0.3,) * shape[0]).eval()
        network, x = lower_model(model, shape), torch.rand(5, *shape)
        assert torch.allclose(network(x), model.double()(x.double()), rtol=0, atol=1e-10)
        assert len(network.relus) == {"mnist_net": 3}.get(name, 17)


class ByValue(nn.Module):
    def forward(self, x):
        flat = x.flatten(1)
        return torch.stack([flat.sum(1), -flat.sum(1)], 1) if flat[0, 0] > 0 else flat


class Aliased(nn.Module):
    def forward(self, x):
        y = x.view(1 * x.shape[0], -1)
        y -= 0.5
        return y + x.flatten(1)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([nn.Conv2d(1, 2, 3), nn.Sequential(nn.GELU())], r"GELU \('1.0'\) is not supported: torch's gelu"),
        ([nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2)], r"GroupNorm \('1'\) is not supported: torch's group_norm"),
        ([nn.MaxPool2d(3, 1, 1)], r"MaxPool2d \('0'\) is not supported: max pooling with padding"),
        ([nn.BatchNorm2d(1, track_running_stats=False)], r"BatchNorm2d \('0'\).*without running averages"),
        ([nn.Flatten(), nn.Linear(15, 4)], r"Linear \('1'\) is not supported: .*15"),
        ([ByValue()], r"ByValue \('0'\) is not supported"),
        ([Aliased()], "other outputs than its layers"),
        ([nn.Flatten(), nn.Softmax(1)], r"Softmax \('1'\)"),
    ],
)
def test_what_cannot_be_verified_is_refused_by_name(layers, words):
    with pytest.raises(FastrobustError, match=words):
        lower_model(nn.Sequential(*layers), SHAPE)


def test_what_does_not_fit_into_memory_is_undecided(monkeypatch):
    monkeypatch.setattr("fastrobust.verification.reduced.LARGEST", 10)
    model, pixels = made("batchnorm"), images(1, 0, SHAPE)
    decider, label = Decider(model, SHAPE, 0.3), model(pixels.float() / 255).argmax(1)
    with pytest.raises(TooLarge):
        decider.margins(pixels[0] / 255, label[0], 0)
    monkeypatch.setattr(Decider, "attack", lambda self, x, *_: (torch.zeros(len(x), dtype=torch.bool), x))
    (verdict,) = decide(decider, [0], pixels, label, 10)
    assert (verdict.verdict, verdict.by) == ("timeout", "too many open ReLUs")


def test_a_class_that_other_processes_do_not_have_goes_to_them_as_torchs_modules():
    class Here(Residual):
        pass

    class ByShape(nn.Module):
        def forward(self, x):
            return x.flatten(1) if x.sum() > 0 else x

    x = torch.rand(3, *SHAPE)
    for model in (Here().eval(), Normalized(Here(), (0.5,), (0.2,)).eval()):
        there = pickle.loads(workers.portable(model))
        assert type(there) is not type(model) and torch.equal(there(x), model(x))
    assert isinstance(pickle.loads(workers.portable(Residual())), Residual)
    with pytest.raises(FastrobustError, match=r"cannot read ByShape .*a module that can be imported"):
        workers.portable(ByShape())


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(2, 4, 3, 2, 1, groups=2), nn.ConvTranspose2d(2, 3, 3, 2), nn.AvgPool2d(2, 1), nn.Linear(9, 4)],
    ids=lambda layer: type(layer).__name__,
)
def test_columns_that_are_found_together_are_those_found_one_by_one(layer):
    layer, shape = layer.double(), (2, 7, 9)
    size = layer(torch.zeros(1, *shape, dtype=torch.float64)).numel()
    (relu,) = lower_model(nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(size, 2)), shape).relus
    units = torch.eye(2 * 7 * 9, dtype=torch.float64).view(-1, *shape)
    with torch.no_grad():
        alone = (layer(units) - layer(torch.zeros(1, *shape, dtype=torch.float64))).flatten(1).T
    torch.testing.assert_close(torch.from_numpy(relu.parts[0].toarray()), alone, rtol=0, atol=1e-15)
