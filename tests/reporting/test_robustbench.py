"""Weights in RobustBench's layout: its classes load them and give the run's logits. And its evaluation takes our models."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import robustbench_classes
import torch

import fastrobust
from fastrobust.__main__ import main as cli
from fastrobust.config import reading
from fastrobust.models import create
from fastrobust.models.weights import save_weights
from fastrobust.reporting import export, robustbench

FACTS = {"channels": 3, "classes": 10, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)}


def trained(name: str, dataset: str = "cifar10"):
    """A model whose statistics, scales and shifts are not 0 and 1, and a config of it."""
    torch.manual_seed(0)
    config = reading.load("cifar10_n_fgsm", [f"model.name={name}", f"data.dataset={dataset}"])
    model = create(name, **FACTS | {"classes": len(config.facts.classes)})
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return model.eval(), config


def loaded(folder, usage: str, monkeypatch):
    """The model that the lines of the model card make."""
    monkeypatch.chdir(folder)
    place: dict = {}
    exec(compile(usage, "README.md", "exec"), place)
    return place["model"]


def same_logits(ours, theirs) -> None:
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-4)


OURS = ["preact_resnet18_paper", "preact_resnet18_wong2020", "cifar_resnet18"]
THEIRS = [*OURS, "cifar_resnet50", "wide_resnet28_10", "wide_resnet28_10_silu"]


@pytest.mark.parametrize(
    ("name", "classes"),
    [*((name, robustbench_classes.written_out) for name in OURS), *((name, robustbench_classes.real) for name in THEIRS)],
    ids=[*(f"{name} written out" for name in OURS), *(f"{name} of RobustBench" for name in THEIRS)],
)
def test_robustbenchs_classes_load_the_weights(tmp_path, monkeypatch, name, classes):
    classes(monkeypatch)
    model, config = trained(name)
    torch.save(robustbench.state(model, config), tmp_path / "robustbench.pt")
    same_logits(model, loaded(tmp_path, robustbench.usage(config, 10), monkeypatch))


def test_an_export_has_the_file_and_says_how_to_load_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "write_onnx", lambda *_: None)
    robustbench_classes.written_out(monkeypatch)
    model, config = trained("preact_resnet18_paper", "cifar100")
    save_weights(tmp_path, model, config, config.facts.classes)
    assert cli(["export", str(tmp_path / "model.safetensors"), "-o", str(tmp_path / "out")]) == 0
    assert "README.md, robustbench.json, robustbench.pt" in capsys.readouterr().out
    card = (tmp_path / "out/README.md").read_text()
    (usage,) = re.findall(r"```python\n(import torch\n.*?)```", card, re.DOTALL)
    assert "num_classes=100" in usage
    same_logits(model, loaded(tmp_path / "out", usage, monkeypatch))


def test_torchvisions_networks_stand_behind_normalize_model(tmp_path, monkeypatch):
    robustbench_classes.written_out(monkeypatch)
    model, config = trained("resnet18")
    torch.save(robustbench.state(model, config), tmp_path / "robustbench.pt")
    same_logits(model, loaded(tmp_path, robustbench.usage(config, 10), monkeypatch))


@pytest.mark.parametrize("name", ["preact_resnet18", "preact_resnet18_w16"])
def test_what_robustbench_has_no_class_for_is_left_out(name):
    model, config = trained(name)
    assert robustbench.state(model, config) is None and robustbench.usage(config, 10) is None


def test_robustbenchs_evaluation_takes_a_loaded_model(tmp_path, monkeypatch):
    """Its clean accuracy, and its `benchmark` with a part of AutoAttack, give what `fastrobust.evaluate` gives."""
    bench = robustbench_classes.real(monkeypatch)
    monkeypatch.syspath_prepend(Path(__file__).parent.parent.parent / "examples")
    model, config = trained("own_model:small_net")
    save_weights(tmp_path, model, config, config.facts.classes)
    model = fastrobust.load(tmp_path / "model.safetensors")
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[:2] = (labels[:2] + 1) % 10
    assert bench.utils.clean_accuracy(model, images, labels) == 0.75
    if not hasattr(bench, "benchmark"):
        pytest.skip("this RobustBench has no `benchmark`")

    class AutoAttack(sys.modules["autoattack"].AutoAttack):  # its first part; the package of today takes fewer arguments
        def __init__(self, *arguments, log_path=None, **options):
            super().__init__(*arguments, **options | {"version": "custom", "attacks": ["apgd-ce"]})

        def run_standard_evaluation(self, x, y, bs, state_path=None):
            return super().run_standard_evaluation(x, y)[0]

    monkeypatch.setattr(bench.eval, "AutoAttack", AutoAttack)
    monkeypatch.setattr(bench.eval, "load_clean_dataset", lambda *_: (images, labels))
    clean, robust = bench.benchmark(model, n_examples=8, dataset="cifar10", threat_model="Linf", eps=1 / 255)
    ours = fastrobust.evaluate(model, images, labels, epsilon=1 / 255, attack="apgd-ce")
    assert (clean, robust) == (ours.clean_accuracy, ours.robust_accuracy)
