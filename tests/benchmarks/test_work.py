"""The work that the comparison of methods counts with, and that the heads of newer configs name, is what is computed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from method_steps import shapes_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import method_setting as setting
from fastrobust.attack.threat import Threat
from fastrobust.config import reading
from fastrobust.models.weights import build_model
from fastrobust.train.learner import Learner
from fastrobust.train.methods.base import Inputs
from fastrobust.train.optimizers import Sgd

CONFIGS = Path(__file__).parents[2] / "configs"
NEWER = ["cifar10_liet", "cifar10_fgsm_pgi", "cifar10_fgsm_uap", "imagenet_convnext_tiny", "imagenet_convnext_tiny_finetune"]
SIZES = {"cifar10": (50_000, 10), "imagenet": (1_281_167, 1000)}
UNITS = {"G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}


class ConvNet(nn.Module):
    """No hook of FlopCounterMode sees this module: they refuse leaves under autograd.grad. Its children see x + 0."""

    widths = ((3, 16), (16, 16), (16, 16))

    def __init__(self):
        super().__init__()
        layers = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in self.widths]
        self.network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

    def __call__(self, x):
        return self.network(x + 0)


@pytest.mark.parametrize("name", setting.METHODS)
def test_what_a_step_costs_is_what_it_computes(name):
    """To the gradient of the first layer's input, which an update does not need, and LIET's grey images."""
    n, side = 20, 8
    forward = sum(2 * n * side * side * 9 * a * b for a, b in ConvNet.widths) + 2 * n * 160
    method, x, y = setting.base("small", name).method, torch.rand(n, 3, side, side), torch.arange(n) % 10
    learner = Learner(ConvNet(), Sgd(name="sgd"), torch.full((100,), 0.1), epoch_table=torch.arange(100.0))
    state = method.state(shapes_of(x)._replace(classes=10))
    with FlopCounterMode(display=False) as counted:
        method.step(learner, Inputs(x, y, torch.arange(n)), Threat(8 / 255), 1.0, state)
    assert counted.get_total_flops() / forward / method.updates_per_batch == pytest.approx(setting.passes(method), abs=0.35)


def near(text: str, flop: float) -> bool:
    """Whether a head names so many operations, to the digits that it gives."""
    found = [
        (float(number), len(number.partition(".")[2]), UNITS[unit])
        for number, unit in re.findall(r"([\d.]+) ([GTPE])FLOP\b", text)
    ]
    return any(abs(number - flop / unit) <= 0.51 * 10.0**-digits for number, digits, unit in found)


@pytest.mark.parametrize("name", [*NEWER, "cifar10_methods"])
def test_the_work_in_the_head_is_counted(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    head = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    config = reading.load(CONFIGS / f"{name}.yaml")
    images, classes = SIZES[config.data.dataset]
    images -= config.data.held_out
    side = config.phases[0].resolution
    with torch.device("meta"), FlopCounterMode(display=False) as counted:
        build_model(config, tuple(map(str, range(classes)))).eval()(torch.empty(1, 3, side, side))
    forward = counted.get_total_flops()
    epoch = images * forward * setting.passes(config.method)
    assert near(head, epoch) and near(head, epoch * config.epochs), (epoch, epoch * config.epochs)
    assert near(head, forward) or name == "cifar10_methods"
    if hours := re.search(r"sustains 100 TFLOP/s takes (\d+) hours", head):
        assert int(hours[1]) == round(epoch * config.epochs / 1e14 / 3600)


@pytest.mark.parametrize("name, method", [("liet", "liet"), ("fgsm_pgi", "fgsm_pgi"), ("fgsm_uap", "fgsm_uap")])
def test_the_cifar_configs_are_one_recipe(name, method):
    """That of the public comparison: 100 epochs of 128, one cycle to 0.1, averaged weights, no normalisation."""
    c = reading.load(CONFIGS / f"cifar10_{name}.yaml")
    assert (c.method.name, c.epsilon, c.epochs, c.phases[0].batch_size) == (method, 8 / 255, 100, 128)
    assert (c.schedule.name, c.schedule.max_lr, c.averaging.decay, c.optimizer.weight_decay) == (
        "one_cycle",
        0.1,
        0.9995,
        5e-4,
    )
    assert (c.data.held_out, c.selection.steps, c.selection.every) == (1000, 10, 1)
    assert (c.model.name, c.model.mean, c.model.std) == ("cifar_resnet18", (0, 0, 0), (1, 1, 1))
    assert c.method.label_smoothing == (0.6 if name == "liet" else 0.4) and not c.method.stop_gradient
    assert (c.evaluation.steps, c.evaluation.restarts, c.evaluation.epsilon) == (50, 10, (8 / 255,))


@pytest.mark.parametrize("name, epochs", [("imagenet_convnext_tiny", 110), ("imagenet_convnext_tiny_finetune", 50)])
def test_the_imagenet_configs_are_the_one_step_recipe(name, epochs):
    c = reading.load(CONFIGS / f"{name}.yaml")
    assert (c.method.name, c.method.init, c.epsilon, c.method.alpha) == ("fgsm", "random", 4 / 255, pytest.approx(6 / 255))
    assert (c.epochs, c.label_smoothing, c.optimizer.weight_decay, c.schedule.max_lr) == (epochs, 0.1, 0.5, 5e-4)
    assert c.model.options == {"stochastic_depth_prob": 0.05} and c.epsilon_warmup > 0
    assert (c.model.weights is not None) == name.endswith("finetune")


def test_the_clean_weights_of_torchvision_start_the_finetuning(tmp_path):
    """A file of torchvision's layout is read into the network that the config names."""
    torchvision = pytest.importorskip("torchvision")
    from fastrobust.models import foreign

    file = tmp_path / "convnext_tiny.pth"
    torch.manual_seed(1)
    theirs = torchvision.models.convnext_tiny()
    torch.save(theirs.state_dict(), file)
    c = reading.load(CONFIGS / "imagenet_convnext_tiny_finetune.yaml", [f"model.weights={file}"])
    ours = build_model(c, tuple(map(str, range(1000)))).eval()
    foreign.load_into(ours, c.model.weights, tuple(map(str, range(1000))))
    x = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(v)[:, None, None] for v in (c.model.mean, c.model.std))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs.eval()((x - mean) / std))
