"""Tests of fastrobust.run: files are whole or untouched, and what comes from a file is never trusted."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fastrobust
from fastrobust.config import reading
from fastrobust.models import create
from fastrobust.models.weights import build_model, read_weights, save_weights
from fastrobust.runtime import run_directory
from fastrobust.runtime.errors import RunError
from fastrobust.runtime.files import write_atomically, write_json, write_text

CLASSES = tuple(f"bar{i}" for i in range(10))


@pytest.fixture
def config(settings, tmp_path):
    return reading.parse(settings(tmp_path / "runs"), "test")


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return build_model(config, CLASSES)


@pytest.fixture
def saved(config, model, tmp_path):
    """A run directory with weights."""
    directory = run_directory.create(config)
    save_weights(directory, model, config, CLASSES)
    return directory


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- atomic writing


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
def test_other_files_on_a_full_disk(tmp_path, device_that_is_full, model, config, file):
    (tmp_path / file).write_text("old")
    writers = {
        run_directory.WEIGHTS: lambda: save_weights(tmp_path, model, config, CLASSES),
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


def test_metrics_are_a_line_of_json_per_epoch(tmp_path):
    history = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25, "warning": "a\nb"}]
    run_directory.write_metrics(tmp_path, history)
    lines = (tmp_path / run_directory.METRICS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == history


# ---- run directories


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
    with pytest.raises(RunError, match="is not a run directory"):
        run_directory.open_run(tmp_path / "absent")
    directory = run_directory.create(config)
    (directory / run_directory.CONFIG).write_bytes(b"\xff\xfe name: x")
    with pytest.raises(RunError, match=r"config\.yaml cannot be read"):
        run_directory.open_run(directory)


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
    with pytest.raises(RunError, match=r"checkpoint\.pt is damaged and cannot be resumed from"):
        run_directory.load_checkpoint(tmp_path)
    assert not marker.exists()


def damages(content: bytes):
    noise = random.Random(0)
    yield b""
    yield b"\0"
    yield b"not a file of this kind at all"
    yield noise.randbytes(5000)
    for share in (0.05, 0.5, 0.95):
        yield content[: int(len(content) * share)]
    yield content[:-1]


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
    with pytest.raises(RunError, match=r"checkpoint\.pt is damaged.*checkpoint\.previous\.pt is damaged too.*delete both"):
        run_directory.load_checkpoint(tmp_path)


def test_a_run_is_trained_by_one_process_at_a_time(config):
    """Another process would have its own lock; another file handle of this one has too."""
    directory = run_directory.create(config)
    left = [directory / f".{run_directory.CHECKPOINT}.abc", directory / f".{run_directory.METRICS}.xyz"]
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
    assert set(os.listdir(directory)) == {run_directory.CONFIG, run_directory.ENVIRONMENT, ".notes"}


# ---- weights


@pytest.mark.parametrize("place", ["run", "weights in the run", "weights alone"])
def test_weights_are_read_back(saved, model, config, tmp_path, place):
    path = saved if place == "run" else saved / run_directory.WEIGHTS
    if place == "weights alone":
        path = tmp_path / "elsewhere.safetensors"
        (saved / run_directory.WEIGHTS).rename(path)
        shutil.rmtree(saved)
    model.eval()
    x = torch.rand(5, 3, 28, 28)
    found, found_config, classes = read_weights(str(path))
    assert found_config == config
    assert classes == CLASSES
    assert found.state_dict().keys() == model.state_dict().keys()
    for name, t in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], t), name
    for loaded in (found, fastrobust.load(path), fastrobust.load(str(path))):
        assert not any(m.training for m in loaded.modules())
        with torch.no_grad():
            assert torch.equal(loaded(x), model(x))


def test_running_statistics_and_eval_mode_are_part_of_a_loaded_model(settings, tmp_path):
    config = reading.parse(settings(tmp_path, model__name="preact_resnet18_w16"), "test")
    torch.manual_seed(1)
    model = build_model(config, CLASSES)
    x = torch.rand(8, 3, 8, 8)
    for _ in range(3):
        model.train()(x)  # moves the running averages
    save_weights(tmp_path, model, config, CLASSES)
    assert model.training  # saving left its mode alone
    loaded = fastrobust.load(tmp_path)
    with torch.no_grad():
        expected = model.eval()(x)
        assert torch.equal(loaded(x), expected)
        assert not torch.allclose(loaded.train()(x), expected)  # the mode matters here


def test_the_loaded_model_is_the_one_that_was_trained(finished_run):
    """Against the checkpoint, which is written apart from the weights."""
    model = fastrobust.load(finished_run)
    tensors, facts = run_directory.load_checkpoint(finished_run)
    config = reading.parse(facts["config"], "checkpoint")
    trained = create("mnist_net", channels=3, classes=10, mean=config.model.mean, std=config.model.std)
    prefix = "learner.model."
    trained.load_state_dict({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})
    x = torch.rand(5, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(model(x), trained.eval()(x))


def test_weights_need_neither_pickle_nor_the_run(saved):
    """Any reader of safetensors gets tensors and a JSON header."""
    with safetensors.safe_open(saved / run_directory.WEIGHTS, "pt") as file:
        metadata = file.metadata()
        assert json.loads(metadata["config"])["model"]["name"] == "mnist_net"
        assert tuple(json.loads(metadata["classes"])) == CLASSES
        assert "network.0.weight" in file.keys()  # noqa: SIM118


def test_damaged_weights_are_an_explained_error(saved):
    file = saved / run_directory.WEIGHTS
    for damaged in damages(file.read_bytes()):
        file.write_bytes(damaged)
        with pytest.raises(RunError, match=r"model\.safetensors is damaged"):
            fastrobust.load(saved)


def test_a_flipped_bit_of_a_weight_is_noticed(saved):
    """safetensors itself reads it without a word."""
    file = saved / run_directory.WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1000] ^= 4
    file.write_bytes(content)
    assert safetensors.torch.load_file(file)
    with pytest.raises(RunError, match=r"model\.safetensors is damaged: its checksum does not fit"):
        fastrobust.load(saved)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m, t: m.clear(), "was not written by fastrobust"),
        (lambda m, t: m.pop("config"), "was not written by fastrobust.*config"),
        (lambda m, t: m.pop("classes"), "was not written by fastrobust.*classes"),
        (lambda m, t: m.update(config="{"), "is damaged"),
        (lambda m, t: m.update(config="{}"), "data: this key is needed"),
        (lambda m, t: m.update(classes="3"), "safetensors"),
        (lambda m, t: m.update(config="[" * 50_000), "is damaged"),
        (lambda m, t: m.update(config="7"), "safetensors"),
        (lambda m, t: m.update(config=m["config"].replace("mnist_net", "mnist_nest")), "no model 'mnist_nest'"),
        (lambda m, t: m.update(config=m["config"].replace("mnist_net", "preact_resnet18_w16")), "do not fit"),
        (lambda m, t: m.update(classes='["a", "b"]'), "do not fit"),
        (lambda m, t: t.pop("network.0.bias"), "do not fit"),
        (lambda m, t: t.update(extra=torch.zeros(1)), "do not fit"),
    ],
)
def test_foreign_weights_are_an_explained_error(saved, change, message):
    file = saved / run_directory.WEIGHTS
    with safetensors.safe_open(file, "pt") as stored:
        metadata, tensors = stored.metadata(), {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    del metadata["sha256"]
    change(metadata, tensors)
    file.write_bytes(safetensors.torch.save(tensors, metadata))
    with pytest.raises(RunError, match=f"(?s){message}"):
        fastrobust.load(file)


def test_missing_weights_are_an_explained_error(config, tmp_path):
    with pytest.raises(RunError, match=r"there are no weights at .*absent$"):
        fastrobust.load(tmp_path / "absent")
    directory = run_directory.create(config)
    with pytest.raises(RunError, match=r"there are no weights .*not finished: `--resume .*bars`"):
        fastrobust.load(directory)
