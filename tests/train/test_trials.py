"""Tests of fastrobust.train.trials: what `engine: auto` stands for on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training_runs import CPU

from fastrobust.config import reading
from fastrobust.models import fused, products, winograd
from fastrobust.runtime import trial
from fastrobust.runtime.errors import ConfigError
from fastrobust.train import precision, trials

pytest.importorskip("numba")


class Network(nn.Module):
    def __init__(self, channels: int = 256):
        super().__init__()
        layers = nn.Conv2d(3, channels, 3, 4), nn.Conv2d(channels, channels, 3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.layers = nn.Sequential(*layers, nn.BatchNorm1d(channels), nn.Linear(channels, 10))

    def forward(self, x):
        return self.layers(x)


def no_numba():
    raise ImportError("no module")


@pytest.fixture
def given(settings, tmp_path):
    return lambda **changes: reading.parse(settings(tmp_path, **{"precision": "fp32"} | changes), "test").with_channels(3)


def ratio_of(monkeypatch, ratio):
    asked = []

    def speed(model, x, run, usual, other):
        asked.append((type(other()), run(x[:2])))
        return ratio

    monkeypatch.setattr(trial, "speed", speed)
    return asked


@pytest.mark.parametrize("ratio, chosen", [(2.0, "winograd"), (1.15, "winograd"), (1.14, "eager"), (None, "eager")])
def test_a_trial_decides(given, monkeypatch, capsys, ratio, chosen):
    asked, network, before = ratio_of(monkeypatch, ratio), Network(), torch.get_rng_state()
    weights = {name: t.clone() for name, t in network.state_dict().items()}
    assert trials.engine_for(given(engine="auto"), CPU, network) == chosen
    assert asked == [(winograd.Filtering, None)] and torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(t, weights[name]) for name, t in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    out = capsys.readouterr().out
    assert out == (
        ""
        if ratio is None
        else f"engine: {chosen}, in a trial Winograd's convolutions were {ratio:.2f} times as fast as plain ones\n"
    )


@pytest.mark.parametrize(
    "changes, network",
    [
        ({"precision": "bf16"}, Network()),
        ({"deterministic": True}, Network()),
        ({"engine": "eager"}, Network()),
        ({}, Network(255)),
        ({}, None),  # the config's, which has no such layer
    ],
)
def test_no_trial_is_made_where_it_cannot_pay(given, monkeypatch, changes, network):
    asked = ratio_of(monkeypatch, 9.0)
    monkeypatch.setattr(products, "have_amx", lambda: False)
    assert trials.engine_for(given(**{"engine": "auto"} | changes), CPU, network) == "eager" and not asked


def test_half_precision_with_amx_has_kernels_of_numba(given, monkeypatch, capsys):
    monkeypatch.setattr(products, "have_amx", lambda: True)
    half = {"engine": "auto", "precision": "bf16"}
    assert trials.engine_for(given(**half), CPU, Network()) == "numba"
    assert capsys.readouterr().out == "engine: numba, this processor has AMX; in bf16 it gains\n"
    assert trials.engine_for(given(**half | {"engine": "eager"}), CPU, Network()) == "eager"
    monkeypatch.setattr(fused, "trouble_with_numba", lambda: "it needs numba (pip install numba): no module")
    assert trials.engine_for(given(**half), CPU, Network()) == "eager"
    with pytest.raises(ConfigError, match=r"engine: numba cannot be had: it needs numba .*Use auto"):
        trials.engine_for(given(engine="numba"), CPU, Network())
    with pytest.raises(ConfigError, match="engine: numba cannot be had: it computes in fp32 or bf16, and precision is fp16"):
        trials.engine_for(given(engine="numba", precision="fp16"), CPU, Network())


def test_what_cannot_be_had_by_name_is_refused(given, monkeypatch):
    asked = ratio_of(monkeypatch, 0.1)
    assert trials.engine_for(given(engine="winograd"), CPU, Network()) == "winograd" and not asked
    for changes, network, why in (
        ({"precision": "bf16"}, Network(), "computes in fp32, and precision is bf16"),
        ({}, None, "no convolution of 3 x 3 pixels"),
        ({}, Network(8), "no convolution of 3 x 3 pixels"),
    ):
        with pytest.raises(ConfigError, match=f"engine: winograd cannot be had: .*{why}.*Use auto"):
            trials.engine_for(given(engine="winograd", **changes), CPU, network)
    monkeypatch.setattr(winograd, "_kernels", no_numba)
    with pytest.raises(ConfigError, match=r"it needs numba \(pip install numba\): no module"):
        trials.engine_for(given(engine="winograd"), CPU, Network())
    assert trials.engine_for(given(engine="auto"), CPU, Network()) == "eager"


def test_the_engine_by_name_means_fp32(given, monkeypatch):
    monkeypatch.setattr(precision, "speed", lambda *arguments: 9.0)
    monkeypatch.setattr(precision.half, "has_bf16", lambda: True)
    found = precision.choose(given(engine="winograd", precision="auto"), CPU)
    assert (found.precision, found.evaluation.precision) == ("fp32", "bf16")


def test_a_real_trial_times_both(given, monkeypatch):
    """On any processor it gives a ratio and no error, and the convolutions were used."""
    monkeypatch.setattr(trial, "ENOUGH", 1)
    with trials.passes(given(engine="auto"), Network(), 4) as (model, x, run):
        used = []
        model.network.layers[0].register_forward_hook(
            lambda *_: used.append(len(torch.overrides._get_current_function_mode_stack()))
        )
        assert trial.speed(model, x, run, trials.contextlib.nullcontext, winograd.Filtering) > 0
    assert used[-2:] == [0, 1]


def test_a_network_that_cannot_be_copied_is_trained_without_a_trial(given, monkeypatch):
    asked, network = ratio_of(monkeypatch, 9.0), Network()
    network.scale = network.layers[0].weight.sum()  # part of a graph: torch copies no such tensor
    assert trials.engine_for(given(engine="auto"), CPU, network) == "eager" and not asked
    assert trials.engine_for(given(engine="winograd"), CPU, network) == "winograd"
    assert trials.speed(given(), network) is None
