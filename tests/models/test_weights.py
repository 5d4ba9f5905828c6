"""Tests of fastrobust.models.weights: weights are read back as they were, and what comes from a file is never trusted."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import torch
from damage import damages

import fastrobust
from fastrobust.config import reading
from fastrobust.models import create
from fastrobust.models.weights import build_model, read_weights, save_weights
from fastrobust.runtime import run_directory
from fastrobust.runtime.errors import RunError

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
        with pytest.raises(RunError, match=r"model\.safetensors is (damaged|empty|a text file that begins)"):
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
    with pytest.raises(RunError, match=r"there are no weights .*not finished: `fastrobust train --resume .*bars`"):
        fastrobust.load(directory)
