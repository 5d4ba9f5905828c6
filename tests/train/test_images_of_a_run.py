"""Tests of the images of a run: bad ones, changed ones, held-out ones."""

import gzip
import json
import os
import shutil

import pytest
import yaml
from data_files import prepare
from training_runs import CPU

from fastrobust.__main__ import main as cli
from fastrobust.evaluation.trained import open_trained
from fastrobust.runtime.distributed import ALONE
from fastrobust.runtime.errors import DataError, RunError
from fastrobust.runtime.run_directory import DIGEST, IMAGES, SKIPPED, as_lines, read_images, write_images
from fastrobust.train import start
from fastrobust.train.training import Training


@pytest.fixture
def data(few_bars, tmp_path):
    return shutil.copytree(few_bars, tmp_path / "data")


def spoil(*files):
    for file in files:
        os.truncate(file, 60)


def images(data, split):
    return sorted((data / split).rglob("*.png"))


@pytest.mark.parametrize("loader", ["resident", "torch"])
def test_all_bad_images_of_both_splits_are_named_in_one_error(loader, quick, data, tmp_path, capsys):
    bad = [*images(data, "train")[5:7], images(data, "test")[3]]
    spoil(*bad)
    assert cli(["train", str(quick(data__path=str(data), loader=loader))]) == 2
    said = capsys.readouterr().err
    assert all(str(file) in said for file in bad) and "data.skip_corrupt=true" in said
    assert not (tmp_path / "runs" / "bars").exists()


def test_many_bad_images_are_listed_in_a_file(quick, data, tmp_path, capsys):
    bad = [*images(data, "train")[::5], *images(data, "test")[:2]]
    spoil(*bad)
    assert cli(["train", str(quick(data__path=str(data)))]) == 2
    said, file = capsys.readouterr().err, tmp_path / "runs" / "bars" / "unusable_images.txt"
    assert f"and {len(bad) - 10} more: all are listed in {file}" in said
    assert all(str(image) in file.read_text() for image in bad) and len(file.read_text().splitlines()) == len(bad)
    assert cli(["train", str(quick(data__path=str(data), data__skip_corrupt=True))]) == 0  # the folder is no run


@pytest.mark.parametrize("loader", ["resident", "torch"])
def test_a_run_that_leaves_bad_images_out_says_so(loader, quick, data, tmp_path, capsys):
    bad = [*images(data, "train")[5:7], images(data, "test")[3]]
    spoil(*bad)
    assert cli(["train", str(quick(data__path=str(data), loader=loader, data__skip_corrupt=True))]) == 0
    out, run = capsys.readouterr().out, tmp_path / "runs" / "bars"
    assert "2 train images are left out" in out and "images: train 68 of 10 classes" in out and "test 19 of" in out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["skipped_images"] == {"train": 2, "test": 1} and summary["training_images"] == 68
    listed = (run / SKIPPED).read_text().splitlines()
    assert len(listed) == 3 and all(str(file) in line for file, line in zip(bad, listed, strict=True))
    names = gzip.decompress((run / IMAGES).read_bytes()).decode().split("\n")
    assert names == [str(f.relative_to(data)) for f in images(data, "train") if f not in bad]


@pytest.mark.parametrize("loader", ["resident", "torch"])
def test_a_run_goes_on_only_with_the_images_that_it_was_begun_with(loader, quick, data, tmp_path, capsys, monkeypatch):
    config = quick(data__path=str(data), loader=loader)
    with monkeypatch.context() as patch:
        end_pass = Training._end_pass
        patch.setattr(Training, "_end_pass", lambda self, *a: (end_pass(self, *a), (_ for _ in ()).throw(RunError("stop"))))
        assert cli(["train", str(config)]) == 2
    run, gone = tmp_path / "runs" / "bars", images(data, "train")[6]
    content = gone.read_bytes()
    spoil(gone)  # "put a good copy in its place", says the error
    assert cli(["train", "--resume", str(run)]) == 2
    assert "put a good copy in its place (a run that was begun goes on with --resume)" in capsys.readouterr().err
    gone.unlink()
    shutil.copy(images(data, "train")[8], gone.with_name("new.png"))
    assert cli(["train", "--resume", str(run)]) == 2
    said = capsys.readouterr().err
    for words in (
        "was begun on 70 training images; there are 70 now",
        f"1 gone or unusable ({gone.relative_to(data)}) and 1 new ({gone.relative_to(data).with_name('new.png')})",
        f"train {run / 'config.yaml'} name=bars-2",
    ):
        assert words in said
    gone.with_name("new.png").unlink()
    assert cli(["train", str(run / "config.yaml"), "name=bars-2"]) == 0  # the command that it names
    assert len(read_images(run.with_name("bars-2"))) == 69
    gone.write_bytes(content)
    assert cli(["train", "--resume", str(run)]) == 0


def test_held_out_images_are_the_test_images_where_there_are_no_others(quick, data, tmp_path, capsys):
    shutil.rmtree(data / "test")
    config = quick(data__path=str(data), data__held_out=20)
    assert cli(["train", str(config)]) == 0
    out, run = capsys.readouterr().out, tmp_path / "runs" / "bars"
    assert "train 50 of 10 classes (5 each)\n        test 20 of 10 classes (2 each)" in out
    assert "held out: 20 training images, the test images" in out
    assert "the test images: 20 held-out training images" in out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["tested_on"] == "20 held-out training images" and summary["held_out_images"] == 20
    assert summary["training_images"] == 50 and summary["examples"] == 20
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["held_out"] == 20
    assert cli(["evaluate", str(run), "--steps", "1", "--restarts", "1", "--json"]) == 0
    out = capsys.readouterr().out
    assert "20 held-out training images" in out and "held-out images  20 of image_folder" in out
    assert json.loads(out.splitlines()[-1])["split"] == "held_out"
    found = open_trained(run).images()
    assert found.checksum() == summary["test_images"] and not set(found.names) & set(read_images(run))
    assert len(open_trained(run).training_images(100).labels) == 50
    for name in range(4):  # the draws are of places: with other files others would be held out
        images(data, "train")[name].unlink()
    with pytest.raises(DataError, match="held-out images were trained on, such as train/"):
        open_trained(run).images()


def test_with_test_images_the_held_out_ones_are_kept_apart(config_of, tmp_path, capsys):
    made = start.training(config_of(data__held_out=10), tmp_path, CPU, ALONE)
    assert sum(made.images["train"].values()) == 60 and sum(made.images["test"].values()) == 20
    assert made.tested_on == "20 test images"
    assert "held out: 10 training images, kept apart from the others and from the test images" in capsys.readouterr().out


def test_names_of_any_kind_are_listed(tmp_path):
    """Of more than one line, and not in UTF-8."""
    names = ["train/a/1.png", "train/a/two\nlines.png", "train/a/" + os.fsdecode(b"\xff.png")]
    write_images(tmp_path, names, {"train": ["x"], "test": []})
    assert read_images(tmp_path) == as_lines(names) and len(set(as_lines(names))) == 3
    assert (tmp_path / SKIPPED).read_text() == "train: x\n"


def test_prepared_images_that_changed_are_no_test_of_held_out_ones(quick, data, tmp_path, capsys):
    """They have no list of files. Written anew from the same source they are the same; with more others are held out."""
    shutil.rmtree(data / "test")
    files = tmp_path / "files"
    arguments = ["image_folder", "--data", data, "-o", files, "--sizes", "28", "--workers", "1", "--splits", "train"]
    assert prepare("dali", arguments) == 0
    config = quick(data__path=str(data), data__prepared=str(files), data__held_out=20, data__workers=1, loader="torch")
    assert cli(["train", str(config)]) == 0
    run, evaluate = tmp_path / "runs" / "bars", ["--steps", "1", "--restarts", "1"]
    assert prepare("dali", [*arguments, "--overwrite", "--storage", "raw"]) == 0
    assert cli(["evaluate", str(run), *evaluate]) == 0
    for file in images(data, "train"):
        shutil.copy(file, file.with_name(f"again_{file.name}"))
    assert prepare("dali", [*arguments, "--overwrite"]) == 0
    capsys.readouterr()
    assert cli(["evaluate", str(run), *evaluate]) == 2
    assert f"the training images in {files} are no longer those that {run} was begun with" in capsys.readouterr().err
    (run / DIGEST).unlink()  # as of an earlier version
    assert cli(["evaluate", str(run), *evaluate]) == 0
