"""Files of version 0.1 as it wrote them before its rooms were reorganised: they load, resume and evaluate as new ones do.
`as_before` gives a new run's files their old form; the oracle is the same run in its new form."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import write_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_runs import CPU

import fastrobust
from fastrobust.__main__ import main as cli
from fastrobust.config import reading
from fastrobust.data import sets
from fastrobust.evaluation import accuracy, results
from fastrobust.evaluation.trained import open_trained
from fastrobust.models.weights import weights_checksum, weights_digest
from fastrobust.runtime import run_directory
from fastrobust.runtime.distributed import ALONE
from fastrobust.train import start
from fastrobust.train.step import Step

CONFIG = """\
name: {name}
output: {output}
seed: 0
device: cpu
engine: auto
loader: auto
precision: fp32
deterministic: false
epsilon: 0.05
epsilon_warmup: 0.0
data:
  dataset: image_folder
  path: {data}
  prepared: null
  workers: null
  download: false
  limit: null
  augment: {{crop: none, padding: 4, flip: false}}
model:
  name: mnist_net
  mean: [0.485, 0.456, 0.406]
  std: [0.229, 0.224, 0.225]
method: {method}
optimizer: {{name: adam, weight_decay: 0.0, decay_batchnorm: true}}
schedule: {{name: cyclic, max_lr: 0.005, peak: 0.4}}
phases:
- {{epochs: 6, batch_size: 20, resolution: 28, resize: 28}}
guard: {{action: stop, steps: 5, alpha: 0.0125, drop: 0.2}}
evaluation:
  epsilon: [0.1, 0.05]
  alpha: null
  steps: 7
  restarts: 2
  batch_size: 500
  limit: null
"""
METHODS = {
    "previous": "{attack_batchnorm: train, name: fgsm, init: previous, alpha: 0.0625, clip_start: true, ibp_weight: 0.0}",
    "free": "{name: free, replays: 2}",
}


def old_config(folder: Path, data: Path, name: str = "bars", method: str = "previous") -> Path:
    """A config.yaml as it was stored; as a config to train from it means the same."""
    file = folder / f"{name}.yaml"
    file.write_text(CONFIG.format(name=name, output=folder, data=data, method=METHODS[method]))
    return file


def as_before(run: Path, config: Path, test: sets.ImageSet | None = None) -> Path:
    """A copy of a run whose files are as version 0.1 wrote them. test: the images of its evaluations and verification."""
    text = config.read_text()
    run = shutil.copytree(run, run.with_name(f"{run.name}_before"))
    (run / "config.yaml").write_text(text)
    (run / "checkpoint.previous.pt").unlink()
    tensors, facts = run_directory.load_checkpoint(run)
    tensors = {name.removeprefix("state."): t for name, t in tensors.items() if not name.startswith("guard.")}
    assert "delta" in tensors and facts["format"] == 3
    history = [
        {k: v for k, v in record.items() if k not in ("guard_images", "guard_epsilon")} for record in facts["history"]
    ]
    facts |= {"format": 2, "config": yaml.safe_load(text), "history": history}
    run_directory.save_checkpoint(run, tensors, facts)
    if (run / "model.safetensors").exists():
        with safe_open(run / "model.safetensors", "pt") as file:
            metadata = file.metadata() | {"config": json.dumps(yaml.safe_load(text))}
        weights = load_file(run / "model.safetensors")
        save_file(weights, run / "model.safetensors", metadata | {"sha256": weights_checksum(weights, metadata)})
    if (run / "summary.json").exists():
        summary = json.loads((run / "summary.json").read_text())
        since = ("engine", "loader", "training_images", "images", "test_images", "weights_sha256", "answers")
        kept = {key: value for key, value in summary.items() if key not in since}
        (run / "summary.json").write_text(json.dumps(kept))
    for path in list((run / results.FOLDER).glob("*.safetensors")):
        record = results.read(path)
        path.unlink()
        record.settings["data"] = old_digest(test)
        record.facts.pop("data")
        record.save(run / results.FOLDER)
    for folder in (run / "verification").glob("*"):
        pixels = test.images.permute(0, 2, 3, 1).numpy()
        about = {
            "weights_sha256": hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest(),
            "dataset": "image_folder",
            "images_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
            "epsilon": json.loads((folder / "settings.json").read_text())["epsilon"],
        }
        (folder / "settings.json").write_text(json.dumps(about))
        summary = json.loads((folder / "summary.json").read_text())
        summary["jobs"] = summary.pop("workers")
        kept = {k: v for k, v in summary.items() if k not in ("dataset", "weights", "images", "data")}
        (folder / "summary.json").write_text(json.dumps(kept))
    return run


def old_digest(data: sets.ImageSet) -> str:
    """What a record of an attack said about its images."""
    content = str(tuple(data.images.shape)).encode() + np.ascontiguousarray(data.images.numpy()).tobytes()
    return hashlib.sha256(content + data.labels.numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("bars"), 200, 20)


@pytest.fixture(scope="module")
def test_images(data) -> sets.ImageSet:
    return sets.load("image_folder", "test", data, resolution=28)


@pytest.fixture(scope="module")
def new(data, tmp_path_factory) -> tuple[Path, Path]:
    """(a finished run with an evaluation and exact verdicts on all 20 test images, its config file)."""
    pytest.importorskip("highspy")
    folder = tmp_path_factory.mktemp("new")
    config, run = old_config(folder, data), folder / "bars"
    assert cli(["train", str(config)]) == 0
    shutil.rmtree(run / results.FOLDER)  # version 0.1 kept nothing of the evaluation at the end of a training
    assert cli(["evaluate", str(run), "--attack", "pgd-3-2,pgd-9-1", "--epsilon", "0.1", "--device", "cpu"]) == 0
    assert cli(["verify", str(run), "--epsilon", "0.002", "--workers", "1"]) == 0
    return run, config


@pytest.fixture
def old(new, test_images) -> Path:
    before = as_before(*new, test_images)
    yield before
    shutil.rmtree(before)


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_weights_config_and_images_are_the_same(old, new, test_images):
    (before, now), images = (open_trained(run) for run in (old, new[0])), test_images.checksum()
    assert before.digest == now.digest == weights_digest(fastrobust.load(old / "model.safetensors"))
    assert before.images().checksum() == now.images().checksum() == images
    assert before.config.loader == now.config.loader == "resident"
    assert before.config.evaluation.alpha == now.config.evaluation.alpha == (0.025, 0.0125)
    assert before.classes == now.classes
    alone = shutil.copy(old / "model.safetensors", old / "alone.safetensors")
    assert open_trained(alone).digest == now.digest


def test_a_finished_run_is_left_as_it_is(old, new, capsys):
    before = {file: file.read_bytes() for file in old.rglob("*") if file.is_file()}
    assert cli(["train", "--resume", str(old)]) == 0
    assert "is finished" in capsys.readouterr().out
    summary = start.run(reading.load(new[1]), old, CPU, ALONE, again=True)  # as a sweep does
    assert summary["clean_accuracy"] == json.loads((new[0] / "summary.json").read_text())["clean_accuracy"]
    assert {file: file.read_bytes() for file in old.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_goes_on_to_the_same_weights(data, tmp_path, monkeypatch, method):
    whole, config = old_config(tmp_path, data, "whole", method), old_config(tmp_path, data, "part", method)
    assert cli(["train", str(whole)]) == 0
    take, taken = Step.take, []

    def stopped(self, batch):
        taken.append(1)
        if len(taken) == 14:  # in the second pass
            os.kill(os.getpid(), signal.SIGTERM)
        take(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "take", stopped)
        assert cli(["train", str(config)]) == 75
    before = as_before(tmp_path / "part", config)
    position = run_directory.load_checkpoint(before)[1]["position"]
    assert (position["pass"], position["step"]) == (1, 14)
    assert cli(["train", "--resume", str(before)]) == 0
    a, b = (load_file(run / "model.safetensors") for run in (before, tmp_path / "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    found, expected = (json.loads((run / "summary.json").read_text()) for run in (before, tmp_path / "whole"))
    for key in ("clean_accuracy", "robust_accuracy", "loader", "engine", "epochs"):
        assert found[key] == expected[key]


def test_a_changed_config_is_still_noticed(old, capsys):
    (old / "summary.json").unlink()
    text = (old / "config.yaml").read_text()
    (old / "config.yaml").write_text(text.replace("max_lr: 0.005", "max_lr: 0.006"))
    assert cli(["train", "--resume", str(old)]) == 2
    assert "schedule.max_lr: 0.005 then, 0.006 now" in capsys.readouterr().err


# ---- evaluations


def test_attacks_are_not_run_again_and_count_in_the_worst_case(old, new, capsys, monkeypatch):
    asked = ["--epsilon", "0.1", "--device", "cpu", "--json"]
    assert cli(["evaluate", str(new[0]), "--attack", "pgd-3-2,pgd-9-1", *asked]) == 0
    expected = last_line(capsys)
    monkeypatch.setattr(accuracy, "run_rounds", lambda *a, **k: pytest.fail("attacked again"))
    assert cli(["evaluate", str(old), "--attack", "pgd-3-2", *asked]) == 0
    found = last_line(capsys)
    assert found["worst_case"] == expected["worst_case"] and found["worst_case"]["attacks"] == ["pgd-3-2", "pgd-9-1"]
    assert cli(["evaluate", str(old), "--attack", "pgd-3-2,pgd-9-1", *asked]) == 0
    assert last_line(capsys) == expected
    names = [{file.name for file in (run / results.FOLDER).iterdir()} for run in (old, new[0])]
    assert names[0] == names[1]


def test_an_unfinished_attack_goes_on(new, test_images, tmp_path, capsys, monkeypatch):
    class Stopped(Exception):
        pass

    asked = ["--attack", "pgd-5-2", "--epsilon", "0.15", "--batch-size", "8", "--device", "cpu", "--json"]
    run = shutil.copytree(new[0], tmp_path / "bars", ignore=shutil.ignore_patterns(results.FOLDER))
    assert cli(["evaluate", str(run), *asked]) == 0
    expected = last_line(capsys)
    shutil.rmtree(run / results.FOLDER)
    save, saves = results.Record.save, []

    def failing(self, folder):
        save(self, folder)
        saves.append(self.place)
        if len(saves) == 2:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(accuracy, "SAVE_EVERY", -1.0)
        patch.setattr(results.Record, "save", failing)
        with pytest.raises(Stopped):
            cli(["evaluate", str(run), *asked])
    before = as_before(run, new[1], test_images)
    (record,) = results.read_all(before / results.FOLDER)
    assert not record.facts["finished"] and (record.place.round, record.place.batches) == (0, 2)
    work, attacked = accuracy.run_rounds, []

    def noted(*arguments, **named):
        attacked.append(named["place"])
        return work(*arguments, **named)

    monkeypatch.setattr(accuracy, "run_rounds", noted)
    assert cli(["evaluate", str(before), *asked]) == 0
    found = last_line(capsys)
    assert (attacked[0].round, attacked[0].batches) == (0, 2)
    for result in (found, expected):
        result.pop("seconds")
        result["attacks"][0].pop("seconds")
    assert found == expected and 0 < found["robust_accuracy"] < found["clean_accuracy"]


@pytest.mark.parametrize("other", ["images", "weights"])
def test_records_about_something_else_are_left_alone(old, capsys, other):
    for path in list((old / results.FOLDER).glob("*.safetensors")):
        record = results.read(path)
        path.unlink()
        record.settings["data" if other == "images" else "weights"] = 64 * "0"
        record.save(old / results.FOLDER)
    before = {file.name for file in (old / results.FOLDER).iterdir()}
    assert cli(["evaluate", str(old), "--attack", "pgd-1-1", "--epsilon", "0.1", "--device", "cpu", "--json"]) == 0
    assert last_line(capsys)["worst_case"]["attacks"] == ["pgd-1-1"]
    assert before < {file.name for file in (old / results.FOLDER).iterdir()}


# ---- exact verdicts


def as_first(old: Path, count: int) -> None:
    """As if --limit COUNT had been given, which took the first images then."""
    file = old / "verification" / "epsilon-0.002" / "verdicts.jsonl"
    lines = sorted(file.read_text().splitlines(keepends=True), key=lambda line: json.loads(line)["index"])
    file.write_text("".join(lines[:count]))


def test_exact_verdicts_are_taken_over(old, new, capsys):
    as_first(old, 12)
    asked = ["--epsilon", "0.002", "--workers", "1", "--json"]
    assert cli(["verify", str(old), "--limit", "5", *asked]) == 0  # images 0, 4, 8, 12 and 16
    shown = capsys.readouterr().out
    assert "3 of 5 images have been decided before" in shown
    assert json.loads(shown.splitlines()[-1])["decided_now"] == 2
    assert cli(["verify", str(old), *asked]) == 0
    shown = capsys.readouterr().out
    assert "14 of 20 images have been decided before" in shown
    found = json.loads(shown.splitlines()[-1])
    expected = json.loads((new[0] / "verification" / "epsilon-0.002" / "summary.json").read_text())
    for key in ("examples", "verified", "falsified", "misclassified", "timeout", "weights", "images"):
        assert found[key] == expected[key]
    assert found["verified"] > 10


@pytest.mark.parametrize("other", ["weights_sha256", "images_sha256", "epsilon"])
def test_exact_verdicts_about_something_else_are_refused(old, capsys, other):
    file = old / "verification" / "epsilon-0.002" / "settings.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | {other: 0.003 if other == "epsilon" else 64 * "0"}))
    assert cli(["verify", str(old), "--epsilon", "0.002", "--workers", "1"]) == 2
    assert "holds verdicts about something else" in capsys.readouterr().err


def test_card_and_page_show_what_they_hold(old, new, tmp_path):
    pages = []
    for run in (old, new[0]):
        assert cli(["report", str(run), "--limit", "0", "-o", str(tmp_path / "r.html")]) == 0
        assert cli(["export", str(run), "-o", str(tmp_path / "export")]) == 0
        page, card = (tmp_path / "r.html").read_text(), (tmp_path / "export" / "README.md").read_text()
        table = page[page.index("<h2>Summary") : page.index("<h2>Training")]
        pages.append((table, card[card.index("## Accuracy") : card.index("## Training")]))
    assert pages[0] == pages[1]
    assert "exact verification, epsilon 0.002" in pages[0][0] and "| pgd-3-2 | 0.1 |" in pages[0][1]
