"""Tests of fastrobust.runtime.run_directory: what comes from a file is never trusted."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from damage import damages

from fastrobust.config import reading
from fastrobust.runtime import run_directory
from fastrobust.runtime.errors import RunError


@pytest.fixture
def config(settings, tmp_path):
    return reading.parse(settings(tmp_path / "runs"), "test")


def test_create_makes_a_directory_that_open_run_reads_back(config):
    directory = run_directory.create(config)
    assert directory == Path(config.output) / "bars"
    assert run_directory.open_run(directory) == (directory, config)
    environment = json.loads((directory / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["hardware"]["threads"] == torch.get_num_threads()


def test_create_refuses_an_existing_run_and_leaves_it_alone(config):
    directory = run_directory.create(config)
    before = {file: file.read_bytes() for file in directory.iterdir()}
    config.seed = 77
    with pytest.raises(RunError, match=r"holds a run already.*--resume .*bars.*name=NAME"):
        run_directory.create(config)
    assert {file: file.read_bytes() for file in directory.iterdir()} == before


def test_create_explains_an_output_folder_that_cannot_be_made(config, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match="cannot be made"):
        run_directory.create(config)


def test_open_run_explains_what_is_no_run(tmp_path, config):
    with pytest.raises(RunError, match=r"is not a run directory: it has no config\.yaml"):
        run_directory.open_run(tmp_path)
    with pytest.raises(RunError, match="absent does not exist"):
        run_directory.open_run(tmp_path / "absent")
    directory = run_directory.create(config)
    (directory / run_directory.CONFIG).write_bytes(b"\xff\xfe name: x")
    with pytest.raises(RunError, match=r"config\.yaml cannot be read"):
        run_directory.open_run(directory)


def test_metrics_are_a_line_of_json_per_epoch(tmp_path):
    history = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25, "warning": "a\nb"}]
    run_directory.write_metrics(tmp_path, history)
    lines = (tmp_path / run_directory.METRICS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == history


# ---- checkpoints


def test_a_checkpoint_is_read_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "float": torch.randn(3, 4),
        "channels last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "double": torch.randn((), dtype=torch.float64),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
        "long": torch.tensor(2**40),
        "bytes": torch.get_rng_state(),
    }
    facts = {"position": {"step": 3, "stopped": None}, "history": [{"loss": 0.1 + 0.2}], "text": "ä\n"}
    run_directory.save_checkpoint(tmp_path, tensors, facts)
    assert os.listdir(tmp_path) == [run_directory.CHECKPOINT]
    found, found_facts = run_directory.load_checkpoint(tmp_path)
    assert found_facts == facts
    assert found.keys() == tensors.keys()
    for name, t in tensors.items():
        assert found[name].dtype == t.dtype
        assert found[name].shape == t.shape
        assert found[name].numpy().tobytes() == t.numpy().tobytes()


def test_no_checkpoint_is_none(tmp_path):
    assert run_directory.load_checkpoint(tmp_path) is None


class Malice:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("form", ["bare pickle", "torch file", "with its checksum"])
def test_a_malicious_checkpoint_is_refused_and_runs_no_code(tmp_path, form):
    marker, file = tmp_path / "marker", tmp_path / run_directory.CHECKPOINT
    content = {"tensors": {"a": Malice(marker)}, "facts": "{}"}
    if form != "bare pickle":
        torch.save(content, file)
        if form == "with its checksum":
            file.write_bytes(sealed(content))
        torch.load(file, weights_only=False)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2))
        pickle.loads(file.read_bytes())
    assert marker.exists()  # it would do harm
    marker.unlink()
    with pytest.raises(RunError, match=r"checkpoint\.pt is damaged .*cannot be resumed"):
        run_directory.load_checkpoint(tmp_path)
    assert not marker.exists()


def test_a_damaged_checkpoint_is_an_explained_error(tmp_path):
    file = tmp_path / run_directory.CHECKPOINT
    run_directory.save_checkpoint(tmp_path, {"a": torch.randn(1000)}, {"b": 1})
    for damaged in damages(file.read_bytes()):
        file.write_bytes(damaged)
        with pytest.raises(RunError, match=r"checkpoint\.pt is damaged"):
            run_directory.load_checkpoint(tmp_path)


def sealed(content) -> bytes:
    """A checkpoint file of any content, with the checksum that belongs to it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()[:-2] + run_directory._seal(hashlib.sha256(buffer.getvalue()).hexdigest())


@pytest.mark.parametrize("content", [{"tensors": {}}, {"facts": "{}"}, {"tensors": {}, "facts": "{"}, [1], 5])
@pytest.mark.parametrize("with_checksum", [False, True])
def test_a_foreign_checkpoint_is_an_explained_error(tmp_path, content, with_checksum):
    if with_checksum:
        (tmp_path / run_directory.CHECKPOINT).write_bytes(sealed(content))
    else:
        torch.save(content, tmp_path / run_directory.CHECKPOINT)
    with pytest.raises(RunError, match=r"checkpoint\.pt is damaged"):
        run_directory.load_checkpoint(tmp_path)


def save_two(folder):
    for number in (1, 2):
        run_directory.save_checkpoint(folder, {"a": torch.full((100,), number)}, {"number": number})


def test_two_checkpoints_are_kept_and_a_plain_torch_load_reads_them(tmp_path):
    for number in range(3):
        run_directory.save_checkpoint(tmp_path, {"a": torch.tensor(number)}, {"number": number})
    assert set(os.listdir(tmp_path)) == {run_directory.CHECKPOINT, run_directory.PREVIOUS}
    assert torch.load(tmp_path / run_directory.PREVIOUS, weights_only=True)["tensors"]["a"] == 1
    assert torch.load(tmp_path / run_directory.CHECKPOINT, weights_only=True)["tensors"]["a"] == 2
    assert run_directory.load_checkpoint(tmp_path)[1] == {"number": 2}


def test_a_torn_checkpoint_is_noticed_and_the_one_before_is_used(tmp_path, capsys):
    """Also where a bit of a tensor flipped, which torch itself reads without a word."""
    save_two(tmp_path)
    last, whole = tmp_path / run_directory.CHECKPOINT, (tmp_path / run_directory.CHECKPOINT).read_bytes()
    spot = whole.index(torch.full((100,), 2).numpy().tobytes())
    flipped = whole[:spot] + b"\3" + whole[spot + 1 :]
    for damaged in (*damages(whole), flipped, whole[:-1] + b"x", whole + b"\0", bytes(len(whole))):
        last.write_bytes(damaged)
        tensors, facts = run_directory.load_checkpoint(tmp_path)
        assert facts == {"number": 1} and tensors["a"][0] == 1
        err = capsys.readouterr().err
        assert err.startswith(f"warning: {last} is damaged") and str(tmp_path / run_directory.PREVIOUS) in err
        assert (tmp_path / "checkpoint.damaged.pt").read_bytes() == damaged
        assert not last.exists()  # so that the next save does not put it in the place of the whole one
    last.write_bytes(flipped)
    assert torch.load(last, weights_only=True)["tensors"]["a"][0] != 2  # torch does not notice


def test_a_run_goes_on_from_the_checkpoint_before_and_its_next_ones_are_whole(tmp_path):
    save_two(tmp_path)
    (tmp_path / run_directory.CHECKPOINT).write_bytes(b"torn")
    run_directory.load_checkpoint(tmp_path)
    run_directory.save_checkpoint(tmp_path, {"a": torch.zeros(1)}, {"number": 3})
    assert run_directory.load_checkpoint(tmp_path)[1] == {"number": 3}
    (tmp_path / run_directory.CHECKPOINT).unlink()  # killed between the two renames
    assert run_directory.load_checkpoint(tmp_path)[1] == {"number": 1}


def test_two_torn_checkpoints_are_an_explained_error(tmp_path):
    save_two(tmp_path)
    for name in (run_directory.CHECKPOINT, run_directory.PREVIOUS):
        (tmp_path / name).write_bytes(b"torn")
    with pytest.raises(RunError, match=r"checkpoint\.pt is damaged.*checkpoint\.previous\.pt is damaged.*delete what is"):
        run_directory.load_checkpoint(tmp_path)


def test_a_run_is_trained_by_one_process_at_a_time(config):
    """Another process would have its own lock; another file handle of this one has too."""
    directory = run_directory.create(config)
    left = [directory / f".{run_directory.CHECKPOINT}.abc", directory / f".{run_directory.METRICS}.xyz"]
    left.append(directory / "evaluations" / ".pgd-5-1.safetensors.uvw")
    left[-1].parent.mkdir()
    for file in left:
        file.write_bytes(b"half a file")
    other = directory / ".notes"
    other.write_text("mine")
    with run_directory.held(directory):
        assert not any(file.exists() for file in left) and other.exists()
        with pytest.raises(RunError, match="is being trained by another process"), run_directory.held(directory):
            pass
    with run_directory.held(directory):
        pass
    assert set(os.listdir(directory)) == {run_directory.CONFIG, run_directory.ENVIRONMENT, ".notes", "evaluations"}
