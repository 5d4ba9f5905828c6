"""The work of a training, counted without doing it, is that of the steps that are done."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from training_runs import STEP_METHODS, on_noise

from fastrobust.__main__ import main as cli
from fastrobust.config import reading
from fastrobust.runtime.operations import Operations
from fastrobust.train import work


class Loader:
    channels, classes, crops = 3, tuple("0123456789"), False

    def __len__(self):
        return 50


def counted(noise) -> int:
    with Operations() as operations:
        noise.step.take(next(noise.batches(1)))
    return operations.number


def config_of(settings, tmp_path, **changes):
    return reading.parse(settings(tmp_path, **changes), "test").with_channels(3)


@pytest.mark.parametrize("method", STEP_METHODS)
def test_shapes_are_enough_to_count_every_method(method):
    """The operations that the real step, with numbers, calls."""
    noise = on_noise(method, side=28)
    noise.step.learner.looks = False
    assert work.of_steps(noise.config, Loader()) == [counted(noise)]


def test_by_hand(settings, tmp_path):
    """FGSM on mnist_net: the attack does a forward pass and the gradients of activations, the update those, without the
    first layer's, and the gradients of weights. Two phases, of which the second has half as many images in a batch."""
    phases = [{"epochs": 1, "batch_size": 8, "resolution": 28}, {"epochs": 1, "batch_size": 4, "resolution": 28}]
    first, rest = 2 * 16 * 14**2 * 4**2 * 3, 2 * (32 * 7**2 * 4**2 * 16 + 32 * 7**2 * 100 + 100 * 10)
    image = 2 * (first + rest) + 2 * first + 3 * rest
    assert work.of_steps(config_of(settings, tmp_path, phases=phases), Loader()) == [8 * image, 4 * image]
    half = config_of(settings, tmp_path, phases=[phases[0] | {"accumulate": 2}])
    assert work.of_steps(half, Loader()) == [8 * image]


def test_the_updates_of_a_history_are_counted_by_phase(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "of_steps", lambda config, loader, network: [10**15, 10**12])
    history = [{"phase": 0, "updates": 3}, {"phase": 0, "updates": 5}, {"phase": 1, "updates": 12}]
    assert work.pflop(config_of(settings, tmp_path), history, Loader()) == pytest.approx(5 + 7e-3)
    free = config_of(settings, tmp_path, method={"name": "free", "replays": 2})
    assert work.pflop(free, history, Loader()) == pytest.approx(5 / 2 + 7e-3 / 2)


def test_a_model_that_looks_at_numbers_is_not_counted(settings, tmp_path):
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3 * 28 * 28, 10)

        def forward(self, x):
            return self.layer(x.flatten(1)) * (2 if x.max().item() > 0.5 else 1)

    network, state = Looks(), torch.get_rng_state()
    assert work.of_steps(config_of(settings, tmp_path), Loader(), network) is None
    assert work.pflop(config_of(settings, tmp_path), [], Loader(), network) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_and_its_plan_say_so(quick, tmp_path, capsys, monkeypatch):
    file = str(quick())
    assert cli(["train", file, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert cli(["train", file]) == 0
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "runs" / "bars" / "summary.json").read_text())["train_pflop"]
    assert found > 0 and f"training took {found:.3g} PFLOP" in told and f"  {found:.3g} PFLOP: every pass" in plan
