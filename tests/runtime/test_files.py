"""Tests of fastrobust.runtime.files, and of what writes through it: files are whole or untouched, on full disks too."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch

from fastrobust.config import reading
from fastrobust.models.weights import build_model, save_weights
from fastrobust.runtime import run_directory
from fastrobust.runtime.errors import RunError
from fastrobust.runtime.files import write_atomically, write_json, write_text


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_written_and_replaced(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"x": 1})
    write_json(file, {"x": [2, "ä"]})
    assert json.loads(file.read_text()) == {"x": [2, "ä"]}
    assert file.stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [b"the old content", None])
def test_an_exception_in_the_middle_of_writing_leaves_the_old_file_alone(tmp_path, failure, old):
    file = tmp_path / "a.bin"
    if old is not None:
        file.write_bytes(old)

    def write(handle):
        handle.write(b"half of the new conte")
        handle.flush()
        assert len(os.listdir(tmp_path)) == (1 if old is None else 2)  # it does go to a file beside
        raise failure

    with pytest.raises(failure):
        write_atomically(file, write)
    assert os.listdir(tmp_path) == ([] if old is None else ["a.bin"])
    assert old is None or file.read_bytes() == old


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_full_disk_is_explained_and_the_old_file_stays(tmp_path, monkeypatch, where):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    if where != "write":
        monkeypatch.setattr(os, where, full_disk)
    with pytest.raises(RunError, match=r"a\.txt cannot be written .*untouched.*No space left"):
        write_atomically(file, full_disk if where == "write" else lambda handle: handle.write(b"new"))
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.fixture
def device_that_is_full(monkeypatch):
    """From now on temporary files are /dev/full: every write fails as on a full disk."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    made = []

    def mkstemp(dir, prefix):
        made.append(Path(dir) / f"{prefix}full")
        made[-1].write_bytes(b"")
        return os.open("/dev/full", os.O_WRONLY), str(made[-1])

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    return made


@pytest.mark.parametrize("size", [1, 3_000_000], ids=["small", "large"])
def test_a_checkpoint_on_a_full_disk_leaves_the_last_one(tmp_path, device_that_is_full, size):
    old = tmp_path / run_directory.CHECKPOINT
    torch.save({"tensors": {"a": torch.ones(2)}, "facts": "{}"}, old)
    before = old.read_bytes()
    with pytest.raises(RunError, match=r"checkpoint\.pt cannot be written .*[Nn]o space left"):
        run_directory.save_checkpoint(tmp_path, {"a": torch.zeros(size)}, {})
    assert len(device_that_is_full) == 1
    assert os.listdir(tmp_path) == [run_directory.CHECKPOINT]
    assert old.read_bytes() == before


@pytest.mark.parametrize("file", [run_directory.WEIGHTS, run_directory.METRICS, run_directory.SUMMARY])
def test_other_files_on_a_full_disk(tmp_path, settings, device_that_is_full, file):
    config, classes = reading.parse(settings(tmp_path / "runs"), "test"), tuple(f"bar{i}" for i in range(10))
    model = build_model(config, classes)
    (tmp_path / file).write_text("old")
    writers = {
        run_directory.WEIGHTS: lambda: save_weights(tmp_path, model, config, classes),
        run_directory.METRICS: lambda: run_directory.write_metrics(tmp_path, [{"epoch": 1}]),
        run_directory.SUMMARY: lambda: write_json(tmp_path / file, {}),
    }
    with pytest.raises(RunError, match=r"cannot be written .*No space left"):
        writers[file]()
    assert os.listdir(tmp_path) == [file]
    assert (tmp_path / file).read_text() == "old"


def test_a_folder_that_is_not_there_is_explained(tmp_path):
    with pytest.raises(RunError, match=r"summary\.json cannot be written .*No such file"):
        write_json(tmp_path / "absent" / "summary.json", {})
