"""The export: what it writes gives the run's logits without fastrobust, and says what was measured."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

import fastrobust
from fastrobust.__main__ import main as cli
from fastrobust.config import schema
from fastrobust.data import loaders
from fastrobust.data.augment import to_unit
from fastrobust.evaluation import results
from fastrobust.models import create
from fastrobust.models.weights import read_weights, save_weights, weights_digest
from fastrobust.reporting import export, known
from fastrobust.runtime import run_directory
from fastrobust.runtime.files import write_json

ALONE = """
import json, sys
sys.modules["fastrobust"] = None  # importing it now fails
import torch
from model import CLASSES, load
network = load()
assert not network.training
images = torch.load("images.pt", weights_only=True)
with torch.no_grad():
    torch.save(network(images), "logits.pt")
print(json.dumps(CLASSES))
"""


@pytest.fixture(scope="module")
def evaluated(finished_run, tmp_path_factory):
    """A copy of a run with a PGD evaluation, all of AutoAttack (its last part finds nothing to do) and checks."""
    copy = shutil.copytree(finished_run, tmp_path_factory.mktemp("evaluated") / "run")
    shutil.rmtree(copy / results.FOLDER, ignore_errors=True)
    for attack in ("pgd-10-2", "apgd-ce,apgd-t,fab-t,square"):
        epsilon = "0.2" if attack == "pgd-10-2" else "0.6"
        arguments = ["--attack", attack, "--epsilon", epsilon, "--limit", "20", "--device", "cpu"]
        assert cli(["evaluate", str(copy), *arguments]) == 0
    return copy


@pytest.fixture(scope="module")
def exported(evaluated):
    assert cli(["export", str(evaluated)]) == 0
    return evaluated / "export"


def test_the_snippet_gives_the_runs_logits_without_fastrobust(evaluated, exported, tmp_path, bars):
    folder = shutil.copytree(exported, tmp_path / "elsewhere")
    _, config, classes = read_weights(evaluated)

    config.data.path = str(bars)
    images = to_unit(loaders.test_set(config, 30).images)
    torch.save(images, folder / "images.pt")
    (folder / "use.py").write_text(ALONE)
    found = subprocess.run([sys.executable, "use.py"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == list(classes)
    with torch.no_grad():
        expected = fastrobust.load(evaluated)(images)
    logits = torch.load(folder / "logits.pt", weights_only=True)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert torch.equal(logits.argmax(1), expected.argmax(1))


def test_onnx_gives_the_same_logits_for_any_batch_size(evaluated, exported):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(exported / "model.onnx"), providers=["CPUExecutionProvider"])
    model = fastrobust.load(evaluated)
    for count in (1, 2, 7, 33):
        images = torch.rand(count, 3, 28, 28)
        with torch.no_grad():
            expected = model(images)
        found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


OWN = """
from torch import nn

def network(channels, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 28 * 28, classes))
"""


@pytest.mark.parametrize(
    "name",
    [
        "mnist_net",
        "preact_resnet18_w16",
        "preact_resnet18_paper",
        "patch_resnet14",
        "cifar_resnet18",
        "wide_resnet28_10",
        "resnet18",
        "timm/resnet10t",
        "own_model:network",
    ],
)
def test_every_kind_of_model_is_exported(finished_run, tmp_path, name, capsys, monkeypatch):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    (tmp_path / "own_model.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    if name not in ("preact_resnet18_w16", "patch_resnet14", "own_model:network"):
        monkeypatch.setattr(export, "write_onnx", lambda *arguments: None)  # it takes its time
    _, config, classes = read_weights(finished_run)
    config.model.name = name
    config.model.options = {"width": 8, "activation": "silu"} if name == "patch_resnet14" else None
    torch.manual_seed(0)
    facts = {"channels": 3, "classes": 10, "mean": config.model.mean, "std": config.model.std}
    model = create(name, **facts, options=config.model.options)
    save_weights(tmp_path, model, schema.Config(**config.to_dict()), classes)
    assert cli(["export", str(tmp_path / "model.safetensors"), "--output", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["onnx_difference"] is None or found["onnx_difference"] < 1e-3
    assert "None is known for these weights" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "robustbench.json").read_text())["autoattack_acc"] is None


def test_the_card_and_the_entry_say_what_was_measured(evaluated, exported):
    summary = json.loads((evaluated / run_directory.SUMMARY).read_text())
    card = (exported / "README.md").read_text()
    entry = json.loads((exported / "robustbench.json").read_text())
    for e in summary["evaluations"]:
        low, high = results.wilson(round(e["robust_accuracy"] * 200), 200)
        row = f"| pgd-7-2 | {e['epsilon']:g} | {e['robust_accuracy']:.2%} | {low:.2%} to {high:.2%} | 200 |"
        assert row in card
    assert f"| none | 0 | {summary['clean_accuracy']:.2%} |" in card
    records = {r.settings["attack"]: r for r in results.read_all(evaluated / results.FOLDER)}
    pgd, apgd = records["pgd-10-2"], records["apgd-ce"]
    assert f"| pgd-10-2 | 0.2 | {int((pgd.clean & ~pgd.broken).sum()) / 20:.2%} |" in card
    assert f"| apgd-ce | 0.6 | {int((apgd.clean & ~apgd.broken).sum()) / 20:.2%} |" in card
    auto = int(results.worst_case([r for name, r in records.items() if name != "pgd-10-2"]).sum()) / 20
    assert f"| worst case over apgd-ce, apgd-t, fab-t, square | 0.6 | {auto:.2%} |" in card
    assert f"| autoattack | 0.6 | {auto:.2%} |" in card
    assert "Checks for masked gradients were not made" in card
    assert entry["autoattack_acc"] == f"{100 * auto:.2f}" and entry["eps"] == "0.6"
    assert entry["clean_acc"] == f"{100 * int(apgd.clean.sum()) / 20:.2f}"
    assert entry["footnote"] == "Measured on 20 test images."
    assert entry["reported"] is None  # the summary is about another radius and more images
    fields = "link name authors additional_data number_forward_passes dataset venue architecture eps clean_acc reported"
    assert set(fields.split()) < entry.keys()


def test_masking_verdicts_are_in_the_card_if_they_are_of_these_weights(evaluated, tmp_path):
    copy = shutil.copytree(evaluated, tmp_path / "run")
    weights = weights_digest(fastrobust.load(copy))
    verdict = {"verdict": "masked", "failed": ["single step"], "examples": 300, "epsilon": 8 / 255}
    for name, of in (("a", weights), ("b", "other")):
        write_json(copy / results.FOLDER / f"sanity_{name}.json", verdict | {"weights": of})
    assert cli(["export", str(copy)]) == 0
    card = (copy / "export" / "README.md").read_text()
    assert card.count("Checks for masked gradients") == 1
    assert "at epsilon 8/255 (300 images): masked: single step failed" in card


@pytest.mark.parametrize("parts, claimed", [(4, True), (3, False)])
def test_autoattack_is_claimed_only_if_all_of_it_was_run(evaluated, parts, claimed):
    records = [r for r in results.read_all(evaluated / results.FOLDER) if not r.settings["attack"].startswith("pgd")]
    found = known.autoattack_of(records[:parts])
    assert (found is not None) == claimed
    untried = records[-1]
    untried.attacked = untried.attacked & (torch.arange(20) > 19)
    untried.clean[0] = True
    for r in records:
        r.broken[0], r.clean[0] = False, True
    assert known.autoattack_of(records) is None


def test_without_the_packages_the_rest_is_exported(finished_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert cli(["export", str(finished_run), "--output", str(tmp_path / "out")]) == 0
    assert "pip install 'onnx>=" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "model.py",
        "robustbench.json",
        "weights.pt",
    ]


def test_an_onnx_model_that_differs_is_not_written(finished_run, tmp_path, capsys, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession

    class Wrong:
        def __init__(self, *arguments, **options):
            self.session = session(*arguments, **options)

        def run(self, *arguments):
            return [self.session.run(*arguments)[0] + 0.01]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    assert cli(["export", str(finished_run), "--output", str(tmp_path)]) == 2
    assert "logits differ by 0.01" in capsys.readouterr().err
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("case", ["absent", "weights alone", "damaged summary", "no folder"])
def test_a_mistake_is_explained(finished_run, tmp_path, capsys, case):
    copy = shutil.copytree(finished_run, tmp_path / "run")
    argv, message = {
        "absent": ([str(tmp_path / "absent")], "there are no weights at"),
        "weights alone": ([str(copy / "model.safetensors")], "name a folder for the export with --output"),
        "damaged summary": ([str(copy)], "summary.json is damaged"),
        "no folder": ([str(copy), "--output", str(copy / "config.yaml")], "cannot be made"),
    }[case]
    if case == "damaged summary":
        (copy / "summary.json").write_text('{"evaluations": [{}]}')
    assert cli(["export", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_what_is_printed_fits_80_columns(finished_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli(["export", str(finished_run), "-o", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and "out/: model.py with weights.pt" in lines[0]
