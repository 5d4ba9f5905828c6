"""Weights of other programs, evaluated by the command and taken as a start: the figures are those of the run that left
them."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch

from fastrobust.__main__ import main as cli
from fastrobust.evaluation.foreign import open_foreign
from fastrobust.models.weights import load
from fastrobust.runtime import run_directory

BARS = ("--model", "mnist_net", "--dataset", "image_folder", "--epsilon", "0.1")


@pytest.fixture(scope="module")
def theirs(finished_run, tmp_path_factory):
    """The finished run's network with its normalisation outside, as another program would have written it."""
    file = tmp_path_factory.mktemp("theirs") / "theirs.pth"
    network = load(finished_run).network
    torch.save({"epoch": 1, "state_dict": {f"module.{name}": t for name, t in network.state_dict().items()}}, file)
    return file


def evaluate(capsys, *words) -> dict:
    assert cli(["evaluate", *map(str, words), "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_accuracies_are_those_of_the_run(theirs, finished_run, bars, tmp_path, capsys):
    """bars are trained with ImageNet's normalisation, which the file does not hold: the right one is found by trying."""
    common = ("--epsilon", "0.05", "--attack", "pgd-5-1", "--limit", "50")
    finished_run = shutil.copytree(finished_run, tmp_path / "run")
    own = evaluate(capsys, finished_run, *common)
    model = ("--model", "mnist_net", "--dataset", "image_folder", "--data", bars, "--resolution", "28")
    other = evaluate(capsys, theirs, *model, *common)
    keys = ("clean_accuracy", "robust_accuracy", "examples", "weights", "images")
    assert {key: own[key] for key in keys} == {key: other[key] for key in keys}
    common = ("--epsilon", "1.5", "--norm", "l2", *common[2:])
    own, other = evaluate(capsys, finished_run, *common), evaluate(capsys, theirs, *model, *common)
    assert {key: own[key] for key in (*keys, "norm")} == {key: other[key] for key in (*keys, "norm")}
    assert other["norm"] == "l2"


def test_the_normalisation_is_found_and_all_that_was_tried_is_shown(theirs, bars, finished_run, capsys):
    options = {"epsilon": 0.05, "data": str(bars), "resolution": 28}
    trained = open_foreign(theirs, "mnist_net", "image_folder", **options)
    told = capsys.readouterr().out
    assert "normalisation: image_folder's (clean accuracy on 200 images" in told or "normalisation: ImageNet's" in told
    assert "none " in told and "0.5 and 0.5 " in told
    assert torch.equal(trained.model.mean, load(finished_run).mean)


def test_a_normalisation_that_is_given_is_taken(theirs, bars, capsys):
    options = {"epsilon": 0.05, "data": str(bars), "resolution": 28}
    trained = open_foreign(theirs, "mnist_net", "image_folder", constants=([0.4], [0.2, 0.3, 0.4]), **options)
    assert trained.model.mean.flatten().tolist() == pytest.approx([0.4] * 3)
    assert trained.model.std.flatten().tolist() == pytest.approx([0.2, 0.3, 0.4])
    assert trained.config.model.std == pytest.approx((0.2, 0.3, 0.4)) and "normalisation" not in capsys.readouterr().out


def test_constants_may_be_fractions(theirs, bars, capsys):
    common = (*BARS, "--data", bars, "--resolution", "28", "--attack", "pgd-1-1", "--limit", "20", "--mean")
    a = evaluate(capsys, theirs, *common, "123.675/255", "116.28/255", "103.53/255", "--std", "58.395/255", "0.224", "0.225")
    b = evaluate(capsys, theirs, *common, "0.485", "0.456", "0.406", "--std", "0.229", "57.12/255", "57.375/255")
    assert a["clean_accuracy"] == b["clean_accuracy"] > 0.5


@pytest.mark.parametrize("constants", [None, ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
def test_classes_in_another_order_are_warned_of(theirs, bars, tmp_path, capsys, constants):
    options = {"epsilon": 0.05, "data": str(bars), "resolution": 28, "constants": constants}
    open_foreign(theirs, "mnist_net", "image_folder", **options)
    assert "warning" not in capsys.readouterr().err
    weights = torch.load(theirs, weights_only=True)["state_dict"]
    for name in list(weights)[-2:]:
        weights[name] = weights[name].roll(1, 0)
    torch.save(weights, tmp_path / "rolled.pth")
    open_foreign(tmp_path / "rolled.pth", "mnist_net", "image_folder", **options)
    told = capsys.readouterr().err
    assert "no better than guessing (10.0%): the weights, the model, the normalisation or the order of the classes" in told
    assert "the order of image_folder's 10 classes: bar0, bar1, bar2, bar3, bar4, bar5, bar6, bar7, bar8, bar9\n" in told


def test_a_model_that_gives_probabilities_is_refused(bars, tmp_path, capsys, monkeypatch):
    (tmp_path / "ends_in_softmax.py").write_text(
        "from torch import nn\n\n"
        "def model(channels, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 784, classes), nn.Softmax(1))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    torch.save({"1.weight": torch.randn(10, 3 * 784), "1.bias": torch.zeros(10)}, tmp_path / "theirs.pth")
    words = ["--model", "ends_in_softmax:model", *BARS[2:], "--data", str(bars), "--resolution", "28"]
    assert cli(["evaluate", str(tmp_path / "theirs.pth"), *words]) == 2
    assert "the model gives probabilities, and needs to give logits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--dataset", "image_folder"], "--dataset belongs to weights of another program: give --model NAME too"),
        (["--model", "mnist_net"], "--model needs --dataset NAME"),
        (["--model", "mnist_net", "--dataset", "cifra10", "--epsilon", "0.1"], "did you mean 'cifar10'"),
        (["--model", "preact_resnet18_w16", "--dataset", "image_folder", "--epsilon", "0.1"], "do not fit the model"),
        (["--mean", "0.5"], "--mean belongs to weights of another program"),
        (["--model", "mnist_net", "--dataset", "image_folder", "--epsilon", "0.1", "--mean", "0.5"], "give both"),
        (
            ["--model", "mnist_net", "--dataset", "image_folder", "--epsilon", "0.1", "--mean", "0", "1", "--std", "1", "1"],
            "need one number, or one for each of 3 channels; there are 2",
        ),
        (
            [*BARS, "--mean", "123.675", "116.28", "103.53", "--std", "58.395", "57.12", "57.375"],
            "--mean: 123.675 is larger than the pixel range [0, 1]; did you mean 123.675/255?",
        ),
        ([*BARS, "--mean", "0.4", "--std", "57.12"], "--std: 57.12 is larger than the pixel range [0, 1]; did you mean"),
        (["--model", "mnist_net", "--dataset", "cifar10", "--epsilon", "0.1", "--resolution", "224"], "are 32 x 32 pixels"),
        ([], "`fastrobust evaluate FILE --model NAME --dataset NAME --epsilon RADIUS`"),
    ],
)
def test_mistakes(theirs, bars, capsys, words, says):
    words = [*words, "--data", str(bars)]
    assert cli(["evaluate", str(theirs), *words]) == 2
    assert says in capsys.readouterr().err


def test_training_starts_with_the_weights(theirs, quick, tmp_path, capsys):
    """After one update at a learning rate of almost nothing the weights are still the file's."""
    schedule = {"name": "points", "points": [[0, 1e-12], [2, 1e-12]]}
    made = quick(model={"name": "mnist_net", "weights": str(theirs)}, schedule=schedule, guard={"action": "off"})
    assert cli(["train", str(made)]) == 0
    assert "weights: 8 tensors of" in capsys.readouterr().out
    after, before = load(tmp_path / "runs" / "bars"), torch.load(theirs, weights_only=True)["state_dict"]
    for name, tensor in after.network.state_dict().items():
        torch.testing.assert_close(tensor, before[f"module.{name}"], rtol=0, atol=1e-6)


def test_a_run_that_started_with_weights_goes_on_without_their_file(theirs, quick, tmp_path):
    copy = tmp_path / "copy.pth"
    copy.write_bytes(theirs.read_bytes())
    made = quick(model={"name": "mnist_net", "weights": str(copy)})
    assert cli(["train", str(made)]) == 0
    run = tmp_path / "runs" / "bars"
    before = load(run).state_dict()
    for name in (run_directory.SUMMARY, run_directory.WEIGHTS):
        (run / name).unlink()
    copy.unlink()
    assert cli(["train", "--resume", str(run)]) == 0
    assert all(torch.equal(t, before[name]) for name, t in load(run).state_dict().items())


def test_weights_that_do_not_fit_leave_no_run_behind(quick, tmp_path, capsys):
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "a.pt")
    assert cli(["train", str(quick(model={"name": "mnist_net", "weights": str(tmp_path / "a.pt")}))]) == 2
    assert "do not fit the model" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "bars" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"name": "mnist_net", "weights": "/nope.pt"}}, "there is no weights file /nope.pt"),
        ({"logging": ["wandb"]}, "logging: wandb is not installed"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would_refuse(quick, capsys, monkeypatch, changes, says):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli(["train", str(quick(**changes)), "--dry-run"]) == 2
    assert says in capsys.readouterr().err
