"""One way to open a trained model and its images: evaluate, verify and report judge the same images, by the same digests,
whatever is installed; --limit and --data mean the same in all three. The oracle reads the image files one by one."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import bar_images
from data_files import prepare
from PIL import Image

from fastrobust.__main__ import main as cli
from fastrobust.data import loaders, sets
from fastrobust.data.augment import to_unit
from fastrobust.data.held_out import SPREAD
from fastrobust.data.loaders import ffcv
from fastrobust.evaluation import results
from fastrobust.evaluation.trained import open_trained
from fastrobust.models.weights import read_weights, weights_digest
from fastrobust.runtime.errors import DataError

pytest.importorskip("highspy")
EPSILON = "0.002"
COMMANDS = ("evaluate", "verify", "report")


def write_bars(root: Path, classes: dict[str, str], train: int, test: int) -> Path:
    """Bars as an image folder. classes: the folder of each class -> which bar its images show."""
    for split, count, seed in (("train", train, 0), ("test", test, 1)):
        images, labels = bar_images(10 * count, seed)
        for folder, bar in classes.items():
            for i, image in enumerate(images[labels == int(bar)]):
                file = root / split / folder / f"{i:04}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(file)
    return root


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """Classes a, b and c: 40 train and 10 test images of each."""
    return write_bars(tmp_path_factory.mktemp("three"), {"a": "0", "b": "5", "c": "8"}, 40, 10)


@pytest.fixture(scope="module")
def run_of_three(three, config_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run_of_three")
    phases = [{"epochs": 6, "batch_size": 20, "resolution": 28}]
    assert cli(["train", str(config_file(folder, data__path=str(three), phases=phases))]) == 0
    return folder / "runs" / "bars"


@pytest.fixture
def copied(run_of_three, tmp_path) -> Path:
    return shutil.copytree(run_of_three, tmp_path / "copied")


def files_of(root: Path, split: str = "test") -> list[Path]:
    """The images of a split in the order of a data set: by class, then by name."""
    return sorted((root / split).glob("*/*.png"))


def pixels_of(files: list[Path]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


class Judged:
    """What a command says that it judged, and the images that it had."""

    def __init__(self, images: sets.ImageSet, said: dict):
        self.images, self.said = images, said


@pytest.fixture
def judge(monkeypatch, tmp_path, capsys):
    """judge(command, run, *options) -> a Judged. The images are noted where the work begins."""

    def make(command: str, run: Path, *options: str) -> Judged:
        seen = []
        place, name = {
            "evaluate": ("fastrobust.evaluation.command", "run_attacks"),
            "verify": ("fastrobust.verification.workers", "decide_all"),
            "report": ("fastrobust.reporting.inspection", "inspect"),
        }[command]
        module = importlib.import_module(place)
        work = getattr(module, name)

        def noting(*arguments, **named):
            (data,) = (a for a in arguments if isinstance(a, sets.ImageSet))
            seen.append(data.take(arguments[4]) if command == "verify" else data)  # the numbers of those that are chosen
            return work(*arguments, **named)

        own = {
            "evaluate": ["--epsilon", EPSILON, "--attack", "pgd-2-1", "--device", "cpu", "--json"],
            "verify": ["--epsilon", EPSILON, "--workers", "1", "--timeout", "20", "--json"],
            "report": ["--device", "cpu"],
        }[command]
        output = {"verify": ["-o", str(tmp_path / "verdicts")], "report": ["-o", str(tmp_path / "r.html")]}.get(command, [])
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(module, name, noting)
            assert cli([command, str(run), *own, *output, *options]) == 0
        shutil.rmtree(tmp_path / "verdicts", ignore_errors=True)
        if command == "report":
            said = {"page": (tmp_path / "r.html").read_text()}
        else:
            said = json.loads(capsys.readouterr().out.splitlines()[-1])
        return Judged(seen[0], said)

    return make


# ---- --limit


@pytest.mark.parametrize("command", COMMANDS)
def test_limit_takes_evenly_spaced_images_and_the_result_says_which(judge, copied, three, command):
    files = files_of(three)
    chosen = [files[i * 30 // 7] for i in range(7)]
    assert {file.parent.name for file in chosen} == {"a", "b", "c"}
    judged = judge(command, copied, "--limit", "7")
    assert np.array_equal(judged.images.images.permute(0, 2, 3, 1).numpy(), pixels_of(chosen))
    assert [judged.images.classes[i] for i in judged.images.labels] == [file.parent.name for file in chosen]
    if command == "report":
        assert "on 7 test images, each class in proportion" in judged.said["page"]
        assert f"images: {three}; SHA-256 {judged.images.checksum()[:12]}" in judged.said["page"]
    else:
        assert judged.said["examples"] == 7
        assert judged.said["images"] == judged.images.checksum()
        assert judged.said["chosen"] == SPREAD


def test_evaluate_and_verify_tell_weights_and_images_by_the_same_digests(judge, copied):
    evaluated, verified = (judge(command, copied, "--limit", "7").said for command in ("evaluate", "verify"))
    assert evaluated["weights"] == verified["weights"] == weights_digest(read_weights(copied)[0])
    assert evaluated["images"] == verified["images"]
    (record,) = [record for record in results.read_all(copied / results.FOLDER) if record.settings["examples"] == 7]
    assert (record.settings["weights"], record.settings["data"]) == (verified["weights"], verified["images"])
    more = judge("verify", copied, "--limit", "8").said
    assert more["images"] != verified["images"] and more["weights"] == verified["weights"]


def test_the_digest_of_weights_is_that_of_their_values_in_whichever_file(copied, tmp_path):
    alone = shutil.copy(copied / "model.safetensors", tmp_path / "elsewhere.safetensors")
    trained = open_trained(alone)
    assert trained.digest == open_trained(copied).digest == weights_digest(trained.model)
    with torch.no_grad():
        next(trained.model.parameters()).add_(1e-6)
    assert weights_digest(trained.model) != trained.digest


# ---- --data


def damage_prepared(folder: Path) -> None:
    """Whoever reads these files fails."""
    for file in folder.iterdir():
        file.write_bytes(b"not to be read")


@pytest.fixture(scope="module")
def prepared_runs(three, config_file, tmp_path_factory) -> dict[str, Path]:
    """loader -> a run that was trained from prepared files by this loader."""
    folder, runs = tmp_path_factory.mktemp("prepared"), {}
    for loader, kind in (("ffcv", "ffcv"), ("torch", "dali")):
        if not loaders.available(loader):
            continue
        files, own = folder / f"{loader}_files", folder / loader
        own.mkdir()
        arguments = ["image_folder", "--data", three, "-o", files, "--sizes", "28", "--storage", "raw", "--workers", "2"]
        assert prepare(kind, arguments) == 0
        changes = {"loader": loader, "data__prepared": str(files), "data__path": str(three), "data__workers": 1}
        changes |= {"phases": [{"epochs": 1, "batch_size": 20, "resolution": 28}], "evaluation__limit": 9}
        assert cli(["train", str(config_file(own, **changes))]) == 0
        runs[loader] = own / "runs" / "bars"
    return runs


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("loader", ["ffcv", "torch"])
def test_data_names_the_source_also_for_a_run_trained_from_prepared_files(
    judge, prepared_runs, three, tmp_path, loader, command
):
    if loader not in prepared_runs:
        pytest.skip("needs simplejpeg, OpenCV and numba")
    run = shutil.copytree(prepared_runs[loader], tmp_path / "run")
    other = write_bars(tmp_path / "other", {"a": "0", "b": "5", "c": "8"}, 1, 4)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["loader"] == loader
    files = Path(config["data"]["prepared"])
    aside = shutil.copytree(files, tmp_path / "aside")
    own = judge(command, run, "--limit", "12")
    assert str(files) in own.images.source  # without --data: prepared files, as in training
    try:
        damage_prepared(files)
        judged = judge(command, run, "--data", str(other), "--limit", "12")
    finally:
        shutil.copytree(aside, files, dirs_exist_ok=True)
    assert judged.images.source == str(other)
    expected = pixels_of(files_of(other))
    assert len(expected) == 12
    assert np.array_equal(judged.images.images.permute(0, 2, 3, 1).numpy(), expected)
    if command == "report":
        assert f"images: {other}; SHA-256 {judged.images.checksum()[:12]}" in judged.said["page"]
    else:
        assert judged.said["images"] == judged.images.checksum() != own.said["images"]


@pytest.mark.parametrize("command", COMMANDS)
def test_data_is_the_same_for_a_run_trained_from_the_source(judge, copied, tmp_path, command):
    other = write_bars(tmp_path / "other", {"a": "0", "b": "5", "c": "8"}, 1, 4)
    judged = judge(command, copied, "--data", str(other))
    assert np.array_equal(judged.images.images.permute(0, 2, 3, 1).numpy(), pixels_of(files_of(other)))


# ---- what `auto` chose


@pytest.mark.parametrize("present", [(), loaders.FAST, ("nvidia.dali",), (*loaders.FAST, "nvidia.dali")], ids=str)
def test_what_is_installed_later_changes_no_image(prepared_runs, three, config_file, tmp_path, monkeypatch, capsys, present):
    """A run's config holds the loader that `auto` chose where it was trained, from whatever was installed there."""
    shards = prepared_runs["torch"]
    files = yaml.safe_load((shards / "config.yaml").read_text())["data"]["prepared"]
    changes = {"data__prepared": files, "data__path": str(three), "evaluation__limit": 9}
    changes |= {"phases": [{"epochs": 1, "batch_size": 20, "resolution": 28}]}
    with monkeypatch.context() as patch:
        patch.setattr(loaders, "installed", lambda package: False)
        assert cli(["train", str(config_file(tmp_path, **changes))]) == 0
    run = tmp_path / "runs" / "bars"
    config, summary = yaml.safe_load((run / "config.yaml").read_text()), json.loads((run / "summary.json").read_text())
    assert (config["loader"], config["engine"]) == ("resident", "eager") == (summary["loader"], summary["engine"])
    assert json.loads(json.dumps(read_weights(run)[1].to_dict()))["loader"] == "resident"
    expected = open_trained(run).images().checksum()

    monkeypatch.setattr(loaders, "installed", lambda package: package in present)
    assert open_trained(run).images().checksum() == expected
    for loader, other in prepared_runs.items():
        trained = open_trained(other)
        assert trained.config.loader == loader
        assert str(Path(trained.config.data.prepared)) in trained.images(5).source
    capsys.readouterr()
    asked = ["--limit", "9", "--attack", "pgd-7-2", "--device", "cpu", "--json"]
    assert cli(["evaluate", str(run), *asked]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for key in ("clean_accuracy", "robust_accuracy", "examples"):
        assert found[key] == summary["evaluations"][0][key]


def test_auto_takes_prepared_files_where_their_package_is_installed(prepared_runs, three, config_file, tmp_path):
    """The other way round: trained where FFCV is, `auto` chose it, and it stays."""
    if "ffcv" not in prepared_runs:
        pytest.skip("needs simplejpeg, OpenCV and numba")
    files = yaml.safe_load((prepared_runs["ffcv"] / "config.yaml").read_text())["data"]["prepared"]
    changes = {"data__prepared": files, "data__path": str(three), "evaluation__limit": 9, "data__workers": 1}
    assert cli(["train", str(config_file(tmp_path, **changes))]) == 0
    run = tmp_path / "runs" / "bars"
    assert yaml.safe_load((run / "config.yaml").read_text())["loader"] == "ffcv"
    assert json.loads((run / "summary.json").read_text())["loader"] == "ffcv"
    assert files in open_trained(run).images(3).source


def test_without_the_runs_loader_nothing_else_is_judged_in_its_place(prepared_runs, three, monkeypatch, capsys):
    """Trained with FFCV, evaluated where it is absent: an error, and not other images. The source can be named."""
    if "ffcv" not in prepared_runs:
        pytest.skip("needs simplejpeg, OpenCV and numba")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "simplejpeg" else found(name, *a))
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    ffcv.functions.cache_clear()
    asked = ["evaluate", str(prepared_runs["ffcv"]), "--attack", "pgd-1-1", "--limit", "5", "--device", "cpu"]
    assert cli(asked) == 2
    assert "loader: ffcv needs a package that does not load (" in capsys.readouterr().err
    assert cli([*asked, "--data", str(three)]) == 0
    monkeypatch.undo()
    assert cli(asked) == 0


# ---- other classes


def two_of_three(root: Path) -> Path:
    """Test images of c and a alone, under their own names."""
    return write_bars(root, {"a": "0", "c": "8"}, 1, 12)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_with_two_of_the_three_classes_is_judged_by_name(judge, copied, tmp_path, command):
    folder = two_of_three(tmp_path / "two")
    model, _, classes = read_weights(copied)
    assert classes == ("a", "b", "c")
    files = files_of(folder)
    pixels = torch.from_numpy(pixels_of(files)).permute(0, 3, 1, 2)
    with torch.no_grad():
        right = [classes[i] == f.parent.name for i, f in zip(model(to_unit(pixels)).argmax(1), files, strict=True)]
    assert sum(right) > 0.8 * 24  # by the order of folders, c would be taken for b, and half at most be right
    judged = judge(command, copied, "--data", str(folder))
    assert [judged.images.classes[i] for i in judged.images.labels] == [f.parent.name for f in files]
    if command == "evaluate":
        assert judged.said["clean_accuracy"] == sum(right) / 24
    if command == "verify":
        assert judged.said["misclassified"] == 24 - sum(right)
        assert judged.said["verified"] > 0
    if command == "report":
        rows = dict(re.findall(r"<tr><th>(\w)</th><td>\d+</td><td><meter.*?</meter> (\d+%)</td>", judged.said["page"]))
        ours = {name: [r for r, f in zip(right, files, strict=True) if f.parent.name == name] for name in "ac"}
        assert rows == {name: f"{sum(found) / len(found):.0%}" for name, found in ours.items()}


def test_classes_without_images_are_named(copied, tmp_path, capsys):
    folder = two_of_three(tmp_path / "two")
    assert cli(["evaluate", str(copied), "--data", str(folder), "--attack", "pgd-1-1", "--device", "cpu"]) == 0
    assert f"note: {folder} has no images of class b: accuracies are over the other classes" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_classes_are_refused_by_name(copied, tmp_path, capsys, command):
    folder = write_bars(tmp_path / "odd", {"a": "0", "dog": "5", "cat": "8"}, 1, 4)
    options = {"evaluate": ["--device", "cpu"], "verify": ["--epsilon", EPSILON], "report": ["-o", str(tmp_path / "r")]}
    status = cli([command, str(copied), "--data", str(folder), *options[command]])
    assert status == (0 if command == "report" else 2)  # a page about many runs is made without this one's attacks
    message = f"{folder} has images of 2 classes (cat, dog), but {copied} has 3 classes (a, b, c)"
    assert message in capsys.readouterr().err
    if command == "report":
        page = (tmp_path / "r").read_text()
        assert "was not attacked here" in page and "2 classes (cat, dog)" in page


@pytest.mark.parametrize("odd", [False, True], ids=["fewer", "unknown"])
def test_the_evaluation_of_a_training_run_goes_by_name(three, config_file, tmp_path, capsys, odd):
    """Prepared test files of other classes than the prepared training files."""
    files, folder = tmp_path / "files", two_of_three(tmp_path / "two")
    if odd:
        for split in ("train", "test"):
            (folder / split / "c").rename(folder / split / "cat")
    for split, source in (("train", three), ("test", folder)):
        given = ["image_folder", "--data", source, "-o", files, "--sizes", "28", "--storage", "raw", "--workers", "1"]
        assert prepare("dali", [*given, "--splits", split]) == 0
    changes = {"loader": "torch", "data__prepared": str(files), "data__path": str(three), "data__workers": 1}
    config = str(config_file(tmp_path, phases=[{"epochs": 6, "batch_size": 20, "resolution": 28}], **changes))
    capsys.readouterr()
    message = "has images of class cat, but"
    assert cli(["train", config, "--dry-run"]) == (2 if odd else 0)
    assert (message in capsys.readouterr().err) == odd
    assert cli(["train", config]) == (2 if odd else 0)
    shown, run = capsys.readouterr(), tmp_path / "runs" / "bars"
    if odd:
        assert message in shown.err and "has 3 classes (a, b, c)" in shown.err
        assert not run.exists()  # it is noticed before the training, not after it
        return
    model, _, classes = read_weights(run)
    with torch.no_grad():
        logits = model(to_unit(torch.from_numpy(pixels_of(files_of(folder))).permute(0, 3, 1, 2)))
    right = [classes[i] == file.parent.name for i, file in zip(logits.argmax(1), files_of(folder), strict=True)]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["examples"] == 24 and summary["clean_accuracy"] == sum(right) / 24 > 0.8


def test_labels_are_mapped_by_name_and_the_pixels_stay(three):
    data = sets.load("image_folder", "test", three, resolution=28)
    mapped = data.labelled_as(("c", "x", "b", "a"), "the model")
    assert [mapped.classes[i] for i in mapped.labels] == [data.classes[i] for i in data.labels]
    assert torch.equal(mapped.images, data.images) and mapped.checksum() != data.checksum()
    assert data.labelled_as(data.classes, "the model") is data
    with pytest.raises(DataError, match=r"has images of class c, but the model has 2 classes \(a, b\)"):
        data.labelled_as(("a", "b"), "the model")


def test_training_images_are_the_runs_own_wherever_the_test_images_lie(copied, three, tmp_path):
    """The masking checks train a model on them; a folder of test images alone has none."""
    shutil.copytree(three / "test", tmp_path / "alone" / "test")
    there = open_trained(copied, str(tmp_path / "alone"))
    own = open_trained(copied)
    assert torch.equal(there.training_images(12).images, own.training_images(12).images)
    gone = there.own.model_copy(update={"data": there.own.data.model_copy(update={"path": str(tmp_path / "gone")})})
    with pytest.raises(DataError):
        dataclasses.replace(there, own=gone).training_images(12)
    both = dataclasses.replace(open_trained(copied, str(three)), own=gone)
    assert torch.equal(both.training_images(12).images, own.training_images(12).images)
