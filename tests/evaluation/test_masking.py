"""Checks for masked gradients: models whose gradients mislead by construction are flagged, each by the check that is for it;
a collapsed FGSM model is, a healthy one is not, both trained here."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import bar_images
from data_files import fashion_mnist
from torch import nn

import fastrobust
from fastrobust.__main__ import main as cli
from fastrobust.attack.threat import Threat
from fastrobust.attack.verdicts import evaluating
from fastrobust.data import loaders
from fastrobust.data.augment import to_unit
from fastrobust.data.sets import ImageSet
from fastrobust.evaluation import masking
from fastrobust.evaluation.accuracy import evaluate
from fastrobust.models.weights import read_weights
from fastrobust.reporting import export
from fastrobust.runtime import run_directory
from fastrobust.runtime.errors import ConfigError
from fastrobust.runtime.torchvision_compat import import_torchvision

EPSILON = 0.1


@pytest.fixture(scope="module")
def model(finished_run):
    return fastrobust.load(finished_run)


@pytest.fixture(scope="module")
def data():
    images, labels = map(torch.from_numpy, bar_images(50, 99))
    return ImageSet(images.permute(0, 3, 1, 2), labels, tuple("0123456789"), "")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, value in {"QUERIES": 150, "NOISY_POINTS": 10, "STEPS": 15, "RESTARTS": 1}.items():
        monkeypatch.setattr(masking, name, value)


def check(model, data, **changes) -> dict[str, masking.Check]:
    settings = {"epsilon": EPSILON, "batch_size": 50}
    return {c.name: c for c in masking.check_all(model, data, **(settings | changes))}


def failed(checks) -> set[str]:
    return {name for name, c in checks.items() if not c.passed}


class Wrapped(nn.Module):
    def __init__(self, model, before=lambda x: x, after=lambda logits: logits):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


def test_a_robust_model_passes_all_checks(model, data):
    checks = check(model, data, surrogate=model)
    assert len(checks) == masking.CHECKS
    assert failed(checks) == set()
    assert masking.verdict(list(checks.values())) == "healthy"
    accuracy = checks["growing epsilon"].figures["accuracy"]
    assert list(accuracy) == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0]
    assert checks["transfer"].figures["surrogate_fooled"] > 0.1


def test_rounded_inputs_have_no_gradient_but_yield_to_transferred_examples_and_queries(model, data):
    """Obfuscated gradients: rounding has a derivative of 0."""
    checks = check(Wrapped(model, before=lambda x: (x * 20).round() / 20), data, surrogate=model)
    assert failed(checks) == {"growing epsilon", "transfer", "black box", "gradients"}
    assert checks["gradients"].figures["robust_without_gradient"] > 0.9
    assert checks["transfer"].figures["accuracy"] < 0.9
    assert masking.verdict(list(checks.values())) == "masked"


def test_saturated_logits_hide_the_gradient_of_cross_entropy(model, data):
    checks = check(Wrapped(model, after=lambda logits: logits * 3000), data)
    assert "gradients" in failed(checks)
    assert checks["gradients"].figures["margin_beyond_pgd"] > masking.SLACK


def test_misclassified_half_way_and_right_again_at_the_end():
    """As Kim et al. (2021) found in collapsed models: the distorted interval. Class 0 unless the mean is about 0.55."""

    class Distorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            wrong = 0.02 - (x.flatten(1).mean(1) - 0.55).abs() * self.weight
            return torch.stack([-wrong, wrong], 1)

    images = torch.full((10, 1, 4, 4), 128, dtype=torch.uint8)  # 0.502
    few = ImageSet(images, torch.zeros(10, dtype=torch.int64), ("a", "b"), "")
    with evaluating(model := Distorted()):
        found = masking.landscape(masking.Subject(model, few, Threat(0.1), 5, 0))
    assert not found.passed
    assert found.figures["interior_gradient"] == 1.0
    assert found.figures["nonlinearity_gradient"] > 0.5


def test_nonlinearity_is_0_for_lines_and_1_for_a_round_trip():
    t = torch.linspace(0, 1, 11)[:, None]
    assert masking.nonlinearity(torch.cat([3 * t + 1, -t], 1)) == pytest.approx(0, abs=1e-6)
    tent = 0.5 - (t - 0.5).abs()
    assert masking.nonlinearity(tent) == pytest.approx(1)
    assert masking.nonlinearity(torch.cat([tent, t], 1)) == pytest.approx(0.5)


def test_the_margins_gradient_is_that_of_the_difference_of_logits():
    logits = torch.tensor([[1.0, 5.0, 3.0], [2.0, 0.0, 1.0]])
    assert masking.margin(logits, torch.tensor([1, 2])).tolist() == [-2.0, 1.0]


def test_checks_leave_the_model_and_the_random_numbers_as_they_were(model, data, monkeypatch):
    model.train()
    model.network[0].weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    monkeypatch.setattr(masking, "STEPS", 2)
    check(model, ImageSet(data.images[:9], data.labels[:9], data.classes, ""), surrogate=model)
    masking.train_surrogate(data, Threat(EPSILON), 10, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    model.network[0].weight.requires_grad_(True)
    model.eval()


def test_a_surrogate_learns_and_is_the_same_for_the_same_seed(data):
    images, labels = map(torch.from_numpy, bar_images(1500, 7))
    many = ImageSet(images.permute(0, 3, 1, 2), labels, data.classes, "")
    a, b = (masking.train_surrogate(many, Threat(0.02), 10, torch.device("cpu"), seed=4) for _ in range(2))
    x = to_unit(data.images)
    assert torch.equal(a(x), b(x))
    assert (a(x).argmax(1) == data.labels).float().mean() > 0.5


def test_a_model_that_is_never_right_cannot_be_checked(model, data):
    rest = data.labels > 0
    wrong = ImageSet(data.images[rest], data.labels[rest], data.classes, "")
    with pytest.raises(ConfigError, match="classifies none of the 45 images correctly"):
        check(Wrapped(model, after=lambda logits: logits * 0 + torch.eye(11)[10, :10]), wrong)


# ---- collapsed and healthy, both real


def trained(folder, name, *overrides) -> str:
    settings = ["data.limit=6000", "schedule.max_lr=5e-3", "guard.action=off", "device=cpu", f"output={folder}"]
    settings += ["evaluation.limit=100", "evaluation.restarts=1", "evaluation.steps=5", f"name={name}"]
    assert cli(["train", "configs/quickstart.yaml", *settings, *overrides]) == 0
    return f"{folder}/{name}"


def test_a_collapsed_fgsm_model_is_flagged_and_a_healthy_one_is_not(tmp_path, capsys, monkeypatch, request):
    """mnist_net on 6,000 images of Fashion-MNIST: FGSM from a zero start at epsilon 0.3, and from a random start at 0.1."""
    fashion_mnist()
    monkeypatch.chdir(request.config.rootpath)
    collapsed = trained(
        tmp_path, "collapsed", "method.init=zero", "epsilon=0.3", "evaluation.epsilon=0.3", "phases.0.epochs=4"
    )
    healthy = trained(tmp_path, "healthy", "method.clip_start=false", "phases.0.epochs=3")
    found = {}
    for name, other in ((collapsed, healthy), (healthy, collapsed)):
        arguments = [name, "--sanity", "--transfer", other, "--limit", "110", "--attack", "pgd-20-1", "--json"]
        assert cli(["evaluate", *arguments, "--alpha", "0.03", "--device", "cpu"]) == 0
        out = capsys.readouterr().out
        found[name] = json.loads(out.splitlines()[-1])["sanity"]
        kept = next((tmp_path / name).glob("evaluations/sanity_*.json"))
        assert json.loads(kept.read_text())["verdict"] == found[name]["verdict"]
        assert ("MASKED" in out) == (name == collapsed)
    assert found[collapsed]["verdict"] == "masked" and "single step" in found[collapsed]["failed"]
    assert found[healthy]["verdict"] == "healthy" and found[healthy]["failed"] == []
    figures = {name: result["checks"][0]["figures"] for name, result in found.items()}
    assert figures[collapsed]["gap"] > 0.25 > 0.18 > figures[healthy]["gap"]
    assert figures[collapsed]["pgd"] < 0.1 and figures[healthy]["pgd"] > 0.5
    assert [c["name"] for c in found[healthy]["checks"]][5] == "transfer"
    pgd_agrees_with_torchattacks(healthy)


def pgd_agrees_with_torchattacks(directory: str) -> None:
    """PGD-20 with one restart on 200 test images of a trained model. Theirs looks at the last point alone."""
    import_torchvision()
    torchattacks = pytest.importorskip("torchattacks")
    model, config, _ = read_weights(directory)
    data = loaders.test_set(config, 200)
    torch.manual_seed(0)
    attack = torchattacks.PGD(model, eps=EPSILON, alpha=EPSILON / 4, steps=20, random_start=True)
    theirs = (model(attack(to_unit(data.images), data.labels)).argmax(1) == data.labels).float().mean().item()
    mine = evaluate(model, data, epsilon=EPSILON, alpha=EPSILON / 4, steps=20, restarts=1, batch_size=200)
    assert mine["robust_accuracy"] < mine["clean_accuracy"] - 0.1
    assert theirs - 0.03 <= mine["robust_accuracy"] <= theirs + 0.01


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--transfer", "x"], "is one of the checks of --sanity"),
        (["--sanity", "--epsilon", "0"], "needs a radius above 0"),
        (["--sanity", "--transfer", "absent.safetensors"], "there are no weights at"),
    ],
)
def test_a_mistake_is_explained(finished_run, tmp_path, capsys, arguments, message):
    alone = tmp_path / "weights.safetensors"
    alone.write_bytes((finished_run / run_directory.WEIGHTS).read_bytes())
    assert cli(["evaluate", str(alone), "--attack", "pgd-1-1", "--limit", "10", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_check_that_cannot_be_run_is_said(finished_run, tmp_path, capsys, monkeypatch):
    def absent(numbers):
        raise ConfigError("it needs a package")

    monkeypatch.setattr(masking.Square, "check", absent)
    run = shutil.copytree(finished_run, tmp_path / "run")
    asked = ["--attack", "pgd-1-1", "--limit", "20", "--sanity", "--transfer", str(run), "--device", "cpu"]
    assert cli(["evaluate", str(run), *asked]) == 0
    out, words = capsys.readouterr().out, "healthy: 7 of 8 checks passed, black box not run"
    assert f"verdict          {words} on 20 images" in out and "skip black box" in out
    assert json.loads(next(run.glob("evaluations/sanity_*.json")).read_text())["not_run"] == ["black box"]
    monkeypatch.setattr(export, "write_onnx", lambda *arguments: None)  # it takes its time
    assert cli(["export", str(run)]) == cli(["report", str(run), "--limit", "0", "-o", str(tmp_path / "r.html")]) == 0
    assert words in (run / "export" / "README.md").read_text() and words in (tmp_path / "r.html").read_text()


def test_the_command_trains_a_surrogate_of_its_own(finished_run, tmp_path, capsys):
    alone = tmp_path / "weights.safetensors"
    alone.write_bytes((finished_run / run_directory.WEIGHTS).read_bytes())
    assert cli(["evaluate", str(alone), "--attack", "pgd-1-1", "--limit", "20", "--sanity", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "verdict          healthy: all 8 checks passed on 20 images" in out
