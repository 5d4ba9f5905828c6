"""Tests of fastrobust.train.precision: what `precision: auto` stands for."""

from __future__ import annotations

import json

import pytest
import torch
from training_runs import CPU

from fastrobust.__main__ import main as cli
from fastrobust.config import reading
from fastrobust.runtime import half, limits, run_directory, trial
from fastrobust.runtime.errors import ConfigError
from fastrobust.train import precision, step


@pytest.fixture
def given(settings, tmp_path):
    """given(**changes) -> a config that leaves the precision to the run."""
    return lambda **changes: reading.parse(settings(tmp_path, precision="auto", **changes), "test").with_channels(3)


@pytest.mark.parametrize("ratio, chosen", [(4.0, "bf16"), (1.15, "bf16"), (1.14, "fp32"), (0.3, "fp32")])
def test_a_trial_decides_where_the_processor_has_bf16(given, monkeypatch, capsys, ratio, chosen):
    monkeypatch.setattr(half, "has_bf16", lambda: True)
    monkeypatch.setattr(precision, "speed", lambda config, network: ratio)
    found = precision.choose(given(), CPU)
    assert found.precision == found.evaluation.precision == chosen
    told = f"precision of training and evaluation: {chosen}, in a trial bf16 was {ratio:.2f} times as fast"
    assert told in capsys.readouterr().out
    for mine, one in ({"precision": "fp32"}, "evaluation"), ({"evaluation": {"precision": "fp32"}}, "training"):
        found = precision.choose(given().model_copy(update=mine) if "precision" in mine else given(**mine), CPU)
        assert {found.precision, found.evaluation.precision} == {"fp32", chosen}
        assert f"precision of {one}: {chosen}" in capsys.readouterr().out


@pytest.mark.parametrize("has, deterministic", [(False, False), (True, True)])
def test_without_bf16_or_where_runs_must_be_alike_it_is_fp32(given, monkeypatch, capsys, has, deterministic):
    monkeypatch.setattr(half, "has_bf16", lambda: has)
    monkeypatch.delattr(precision, "speed")
    found = precision.choose(given(deterministic=deterministic), CPU)
    assert found.precision == found.evaluation.precision == "fp32"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("has, chosen", [(True, "bf16"), (False, "fp16")])
def test_on_a_gpu_it_is_half_precision(given, monkeypatch, has, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    found = precision.choose(given(), torch.device("cuda", 0))
    assert (found.precision, found.evaluation.precision) == (chosen, "fp32")
    given_fp32 = given().model_copy(update={"precision": "fp32"})
    assert precision.choose(given_fp32, torch.device("cuda", 0)).precision == "fp32"


@pytest.mark.parametrize("flag, has", [("avx512_bf16", True), ("amx_bf16", True), ("bf16", True), ("avx512_f", False)])
def test_what_the_processor_has_is_told_by_torch(monkeypatch, flag, has):
    assert isinstance(half.has_bf16(), bool)
    found = {"avx512_bf16": False, "architecture": "x86_64", "l2_cache_size": 1, flag: True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert half.has_bf16() is has


def test_the_trial_times_both_and_leaves_no_trace(given, monkeypatch):
    """A clock on which every pass in bf16 takes 2 s and every other 5 s; the first of each, 100 s more."""
    now, passes = [0.0], []

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(28 * 28 * 3, 10)

        def forward(self, x):
            passes.append(torch.is_autocast_enabled("cpu"))
            now[0] += (2.0 if passes[-1] else 5.0) + (100.0 if len(passes) < 5 else 0.0)
            return self.layer(x.flatten(1))

    monkeypatch.setattr(trial.time, "process_time", lambda: now[0])
    monkeypatch.setattr(trial, "ENOUGH", 2 * 28 * 28 * 3 * 10)
    network, before, threads = Network(), torch.get_rng_state(), torch.get_num_threads()
    weights = network.layer.weight.clone()
    assert precision.speed(given(), network) == 2.5
    assert passes[2:] == [False, True] * 4  # the first two count operations and memory
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(network.layer.weight, weights)
    assert network.layer.weight.grad is None
    monkeypatch.setattr(trial, "ENOUGH", 2 * 28 * 28 * 3 * 10 + 1)
    assert precision.speed(given(), network) is None


def test_a_small_network_is_trained_in_fp32_without_a_word(given, monkeypatch, capsys):
    monkeypatch.setattr(half, "has_bf16", lambda: True)
    assert precision.choose(given(), CPU).precision == "fp32" and capsys.readouterr().out == ""


def test_a_trial_takes_no_memory_that_is_not_there(given, monkeypatch):
    """A trial that the system kills would end the run without a word."""
    images = []

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(28 * 28 * 3, 10)

        def forward(self, x):
            images.append(len(x))
            return self.layer(x.flatten(1))

    monkeypatch.setattr(trial, "ENOUGH", 1)
    each = 4 * 28 * 28 * 3
    for fit, size in ((100, 16), (5.5, 5), (2, 2)):
        monkeypatch.setattr(limits, "available_memory", lambda fit=fit: 2 * fit * each)
        images.clear()
        assert precision.speed(given(), Network()) > 0 and images == [1, 1] + 8 * [size]
    monkeypatch.setattr(limits, "available_memory", lambda: 3 * each)
    images.clear()
    assert precision.speed(given(), Network()) is None and images == [1, 1]


def test_a_step_without_a_run_chooses_too(config_of, begin, monkeypatch):
    monkeypatch.setattr(half, "has_bf16", lambda: True)
    monkeypatch.setattr(precision, "speed", lambda config, network: 2.0)
    loader = begin(config_of()).loader
    for name, on in (("auto", True), ("fp32", False)):
        assert step.build(config_of(precision=name), loader, CPU).learner.autocast._enabled is on


def test_a_model_that_does_not_take_the_images_is_named(given):
    with pytest.raises(ConfigError, match="mnist_net cannot take 20 x 20 pixels"):
        precision.speed(given(phases=[{"epochs": 1, "batch_size": 4, "resolution": 20}]))


@pytest.mark.parametrize("chosen", ["fp32", "bf16"])
def test_the_choice_is_said_stored_and_kept(quick, monkeypatch, capsys, tmp_path, chosen):
    monkeypatch.setattr(half, "has_bf16", lambda: True)
    monkeypatch.setattr(precision, "speed", lambda config, network: 2.0 if chosen == "bf16" else 0.5)
    config = str(quick(precision="auto"))
    assert cli(["train", config]) == 0
    shown, run = capsys.readouterr(), tmp_path / "runs" / "bars"
    assert f" loader, cpu, {chosen}, " in shown.out and "meant for GPUs" not in shown.err
    assert json.loads((run / "summary.json").read_text())["precision"] == chosen
    (run / "summary.json").unlink()
    monkeypatch.delattr(precision, "speed")  # no second trial
    assert cli(["train", config, "--resume", str(run)]) == 0
    stored = run_directory.open_run(run)[1]
    assert stored.precision == stored.evaluation.precision == chosen
    assert {e["arithmetic"] for e in json.loads((run / "summary.json").read_text())["evaluations"]} == {chosen}


def test_bf16_reaches_what_fp32_reaches(config_of, begin, bars):
    """Robust accuracy in training, within what two seeds differ by; weights stay fp32."""
    found = {}
    for name in ("fp32", "bf16"):
        phases = [{"epochs": 6, "batch_size": 20, "resolution": 28}]
        training = begin(config_of(precision=name, data__path=str(bars), data__limit=400, phases=phases), name)
        training.train()
        found[name] = training.history[-1]["train_accuracy"]
        assert {t.dtype for t in training.learner.model.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert found["fp32"] > 0.6 and abs(found["fp32"] - found["bf16"]) < 0.1


def test_the_sign_of_a_tiny_gradient_survives_bf16():
    """The gradient of a confident example, 1e-30 of others': bf16 has the exponents of fp32."""
    x = torch.tensor([[3.0, -2.0]], requires_grad=True)
    weight = torch.tensor([[10.0, -7.0], [-6.0, 4.0]])  # logits 44 and -26: the gradient is e**-70 times the second row
    signs = []
    for on in (False, True):
        with half.passes(on):
            logits = torch.nn.functional.linear(x, weight)
        loss = torch.nn.functional.cross_entropy(logits.float(), torch.tensor([0]))
        (gradient,) = torch.autograd.grad(loss, x)
        signs.append(gradient.sign())
    assert signs[0].tolist() == signs[1].tolist() == [[-1.0, 1.0]]
