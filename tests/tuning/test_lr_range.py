"""The range test: on a quadratic its answer is known in closed form."""

from __future__ import annotations

import json
import math

import pytest
import torch
from training_runs import CPU

from fastrobust.__main__ import main as cli
from fastrobust.config import reading
from fastrobust.data import loaders
from fastrobust.runtime.distributed import ALONE
from fastrobust.train import start
from fastrobust.train.step import build
from fastrobust.tuning import lr_range


def quadratic(curvature: float, momentum: float, rates: list[float]) -> list[float]:
    """The losses h w^2 / 2 that SGD meets, the rate of step i being rates[i]."""
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=1.0, momentum=momentum)
    losses = []
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        loss = curvature * w * w / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("curvature", [0.1, 30.0])
def test_a_quadratic_diverges_beyond_its_threshold(curvature, momentum):
    """Gradient descent with heavy-ball momentum is stable for rates below 2 (1 + momentum) / curvature, and the loss falls
    up to there: the recommended rate is that threshold."""
    threshold = 2 * (1 + momentum) / curvature
    rates = lr_range.geometric(threshold / 30, threshold * 30, 400)
    found = lr_range.judge(rates, quadratic(curvature, momentum, rates), half=3)
    assert found.best == pytest.approx(threshold, rel=0.1)
    assert found.diverged > threshold


def test_smoothing_does_not_lag():
    losses = [abs(i - 50) + (3 if i % 2 else -3) for i in range(100)]
    means = lr_range.smooth(losses, 5)
    assert abs(means.index(min(means)) - 50) <= 1
    assert means[20] == pytest.approx(sum(losses[15:26]) / 11)
    assert means[0] == pytest.approx(sum(losses[:6]) / 6)


@pytest.mark.parametrize(
    "losses, best, diverged",
    [
        ([2.3, 2.0, 1.5, 1.0, 1.1, 1.7, 2.3, 2.3], 3, 5),  # back to chance
        ([2.3, 2.0, 1.5, 1.0, 1.1, 1.2, 1.3, 1.3], 3, None),
        ([2.3, 2.0, 1.5, math.nan, 0.1], 2, 3),
        ([2.3, 2.3, 2.32, 2.31, 2.3, 2.29, 2.31, 2.3], None, None),  # noise
        ([2.3, 9.0, 99.0, 99.0], None, 1),
        ([math.inf], None, 0),
        ([2.3, 2.0, 9.0, 0.1], 1, 2),  # what comes after a divergence does not count
    ],
)
def test_judging(losses, best, diverged):
    rates = [10.0**i for i in range(len(losses))]
    found = lr_range.judge(rates, losses, half=0)
    assert found.best == (None if best is None else rates[best])
    assert found.diverged == (None if diverged is None else rates[diverged])


def test_a_real_test(config_file, tmp_path, capsys, monkeypatch):
    """It ends at its divergence, below the last rate, and names a rate that lies between the two."""
    monkeypatch.chdir(tmp_path)
    config = config_file(tmp_path, epsilon_warmup=2)
    assert cli(["lr-range", str(config), "--steps", "60", "--high", "50", "--json"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["rates"][0] == pytest.approx(5e-5)
    assert 5e-5 < result["recommended"] < result["diverged"] < 50
    assert len(result["losses"]) < 60
    assert f"recommended learning rate: {result['recommended']:.3g}" in out
    text = (tmp_path / "lr_range.html").read_text()
    assert text.count("<figure>") == 1 and f"{result['recommended']:.3g}" in text
    assert sorted(f.name for f in tmp_path.iterdir()) == ["bars.yaml", "lr_range.html"]


def test_every_step_has_its_own_rate(settings, tmp_path):
    """`free` replays a minibatch at one rate; the first loss is that of the untrained model."""
    config = start.resolve(reading.parse(settings(tmp_path, method={"name": "free", "replays": 3}), "test"), CPU, ALONE)
    loader = loaders.Phases(config, CPU).enter(0)
    step = build(config, loader, CPU)
    seen = []
    for loss in lr_range.losses_of(step, loader, config, [1e-3, 1e-2, 0.1]):
        seen.append((step.learner.lr.item(), step.learner.updates.item(), loss))
    assert [rate for rate, _, _ in seen] == pytest.approx([1e-3, 1e-2, 0.1])
    assert [updates for _, updates, _ in seen] == [3, 6, 9]
    assert seen[0][2] == pytest.approx(math.log(10), rel=0.1)


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--low", "1", "--high", "0.1"], "--low"),
        (["--steps", "5"], "--steps"),
        (["seed=x"], "seed"),
        (["-o", "no/x.html"], "no"),
    ],
)
def test_bad_arguments_are_explained(config_file, tmp_path, capsys, arguments, word, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--steps", "20"] if "--steps" not in arguments else []
    assert cli(["lr-range", str(config_file(tmp_path)), *arguments, *small]) == 2
    assert word in capsys.readouterr().err


def test_a_plot_that_cannot_be_written_is_said_first(config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lr_range, "run_test", None)
    assert cli(["lr-range", str(config_file(tmp_path)), "-o", str(tmp_path / "absent" / "x.html")]) == 2
    assert "x.html cannot be written" in capsys.readouterr().err
