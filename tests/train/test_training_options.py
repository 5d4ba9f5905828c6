"""Averaged weights, label smoothing, clipped gradients, AdamW, cosine schedules, rates for parts of a model: each against a
slow version or torch's own."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_learner import RATES, make_batches, make_model, plain_training, same_weights, sgd
from torch import nn
from training_runs import assert_same_end, on_noise, run_steps, stop_at

from fastrobust.__main__ import main as cli
from fastrobust.config import reading
from fastrobust.config.sections import Averaging
from fastrobust.evaluation.answers import answers
from fastrobust.evaluation.trained import open_trained
from fastrobust.runtime.errors import ConfigError
from fastrobust.runtime.interrupt import Interrupted
from fastrobust.train.learner import Learner
from fastrobust.train.optimizers import AdamW, Sgd
from fastrobust.train.schedules import Cosine, OneCycle

AVERAGED = {"averaging": {"decay": 0.9}, "model__name": "preact_resnet18_w16", "data__limit": 30}
SMALL = {"phases": [{"epochs": 3, "batch_size": 10, "resolution": 28}]}


def learner_of(model, **options) -> Learner:
    return Learner(model, sgd(), torch.tensor(RATES), **options)


def test_averaged_weights_are_the_mean_written_out():
    model, decay = make_model(), 0.3
    learner = learner_of(model, averaging=decay)
    means = {name: t.clone() for name, t in model.state_dict().items() if t.is_floating_point()}
    for t, (x, y) in enumerate(make_batches(len(RATES))):
        learner.update(x, y)
        tau = min(decay, (1 + t) / (10 + t))
        for name, now in model.state_dict().items():
            if name in means:
                means[name] = tau * means[name] + (1 - tau) * now
    assert "1.running_var" in means
    for name, mean in means.items():
        torch.testing.assert_close(learner.average.tensors[name], mean, rtol=1e-6, atol=1e-7)
    live = copy.deepcopy(model.state_dict())
    learner.average.swap()
    torch.testing.assert_close(model.state_dict()["0.weight"], means["0.weight"], rtol=1e-6, atol=1e-7)
    learner.average.swap()
    assert all(torch.equal(t, live[name]) for name, t in model.state_dict().items())


def test_the_first_weights_are_soon_forgotten():
    """With a decay of 0.9995 a plain average would still be the first weights to 99.6 % after 8 updates."""
    learner = learner_of(make_model(), averaging=0.9995)
    for x, y in make_batches(len(RATES)):
        learner.update(x, y)
    first, last = make_model().state_dict(), learner.model.state_dict()
    moved = (learner.average.tensors["0.weight"] - first["0.weight"]).norm() / (last["0.weight"] - first["0.weight"]).norm()
    assert moved > 0.5


def test_averaging_does_not_change_the_training():
    averaged, plain = learner_of(make_model(), averaging=0.9), learner_of(make_model())
    for x, y in make_batches(4):
        averaged.update(x, y)
        plain.update(x, y)
    assert all(torch.equal(a, b) for a, b in zip(averaged.model.parameters(), plain.model.parameters(), strict=True))


@pytest.mark.parametrize("at", [2, 5])
def test_a_run_with_averaged_weights_resumes_to_the_same_bits(config_of, begin, resume, at):
    config = config_of(**AVERAGED, **SMALL)
    whole = begin(config, "whole")
    whole.train()
    stopped = begin(config)
    stop_at(stopped, at)
    with pytest.raises(Interrupted):
        stopped.train()
    again = resume(config)
    again.train()
    assert_same_end(again, whole)
    mine, theirs = again.learner.average.tensors, whole.learner.average.tensors
    assert all(torch.equal(t, theirs[name]) for name, t in mine.items())


def test_a_run_keeps_and_evaluates_both(quick, tmp_path, capsys):
    assert cli(["train", str(quick(averaging={"decay": 0.5}))]) == 0
    run = tmp_path / "runs" / "bars"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["weights"] == "averaged" and len(summary["evaluations_of_live_weights"]) == len(summary["evaluations"])
    assert "weights before averaging" in capsys.readouterr().out
    averaged, live = load_file(run / "model.safetensors"), load_file(run / "model.live.safetensors")
    stored = torch.load(run / "checkpoint.pt", weights_only=True)["tensors"]
    name = "network.0.weight"
    assert torch.equal(averaged[name], stored[f"learner.averaged.{name}"].contiguous())
    assert torch.equal(live[name], stored[f"learner.model.{name}"].contiguous())
    assert open_trained(run / "model.live.safetensors").digest != open_trained(run).digest == summary["weights_sha256"]
    assert summary["answers"] == answers(open_trained(run).model, (3, 28, 28))


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
def test_label_smoothing_is_in_update_and_attack(smoothing):
    """The loss written out: (1 - s) of the label's and s of the mean over all classes."""

    def slow(logits, y):
        log = logits.log_softmax(1)
        return -((1 - smoothing) * log[torch.arange(len(y)), y] + smoothing * log.mean(1)).mean()

    model, reference = make_model(), make_model()
    learner = learner_of(model, label_smoothing=smoothing)
    optimizer = torch.optim.SGD(reference.parameters(), lr=RATES[0], momentum=0.9, weight_decay=5e-4)
    x, y = make_batches(1)[0]
    z = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(slow(copy.deepcopy(reference)(z), y), z)
    gradient, _ = learner_of(make_model(), label_smoothing=smoothing).input_gradient(x, y)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
    learner.update(x, y)
    slow(reference(x), y).backward()
    optimizer.step()
    same_weights(model, reference)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_clipped_to_one_norm(precision):
    model, reference, most = make_model(), make_model(), 0.05
    learner = learner_of(model, clip_gradients=most, precision=precision)
    x, y = make_batches(1)[0]
    learner.update(x, y)
    F.cross_entropy(reference(x), y).backward()
    norm = torch.stack([p.grad.norm() for p in reference.parameters()]).norm()
    assert norm > 2 * most
    with torch.no_grad():
        for p in reference.parameters():
            p -= RATES[0] * (p.grad * most / norm + 5e-4 * p)
    same_weights(model, reference, atol=1e-6 if precision == "fp32" else 2e-4)


def test_adamw_is_torchs_adamw():
    rates = [lr / 20 for lr in RATES]
    model, reference = make_model(), make_model()
    model[0].bias, reference[0].bias = None, None  # before BatchNorm its gradient is rounding, which Adam would amplify
    batches = make_batches(len(rates))
    learner = Learner(model, AdamW(name="adamw", weight_decay=0.3), torch.tensor(rates))
    for x, y in batches:
        learner.update(x, y)
    plain = torch.optim.AdamW(reference.parameters(), lr=1.0, weight_decay=0.3, foreach=False, fused=False)
    plain_training(reference, plain, batches, rates)
    same_weights(model, reference, atol=1e-5)


def torchs(make, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.3, momentum=0.9)
    schedule, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_cosine_is_torchs():
    ours = Cosine(name="cosine", max_lr=0.3)
    expected = torchs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40), 41)
    assert [ours.rate(k / 10, 4) for k in range(41)] == pytest.approx(expected, abs=1e-12)
    warm = Cosine(name="cosine", max_lr=0.3, warmup=0.25)
    assert [warm.rate(e, 4) for e in (0, 0.5, 1, 2.5, 4)] == pytest.approx([0, 0.15, 0.3, 0.15, 0])


def test_one_cycle_is_torchs():
    """torch counts its steps from 0 to total - 1, and its peak is at pct_start * total - 1."""
    total = 41
    expected = torchs(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=total, pct_start=13 / total, cycle_momentum=False),
        total,
    )
    ours = OneCycle(name="one_cycle", max_lr=0.3, peak=12 / (total - 1))
    assert [ours.rate(k, total - 1) for k in range(total)] == pytest.approx(expected, abs=1e-12)
    assert ours.highest() == max(expected)


def test_the_mean_of_the_schema_needs_a_decay_below_one():
    assert Averaging().decay == 0.999
    with pytest.raises(ValueError, match="less than 1"):
        Averaging(decay=1.0)


# ---- rates for parts of a model


def rated(rates: dict[str, float], **keys) -> Sgd:
    return sgd(rates=rates, **keys)


def test_parts_of_a_model_have_their_own_rates():
    """Against torch's SGD with groups; the longest prefix counts; 0 freezes."""
    model, reference = make_model(), make_model()
    learner = Learner(model, rated({"4": 10.0, "0": 0.0, "4.bias": 0.5}), torch.tensor(RATES) / 10)
    groups = [
        {"params": reference[1].parameters(), "factor": 1.0},
        {"params": [reference[4].weight], "factor": 10.0},
        {"params": [reference[4].bias], "factor": 0.5},
    ]
    plain = torch.optim.SGD(groups, lr=1.0, momentum=0.9, weight_decay=5e-4)
    for (x, y), lr in zip(make_batches(len(RATES)), RATES, strict=True):
        learner.update(x, y)
        for group in plain.param_groups:
            group["lr"] = lr / 10 * group["factor"]
        plain.zero_grad()
        F.cross_entropy(reference(x), y).backward()
        plain.step()
    same_weights(model, reference)
    assert torch.equal(model[0].weight, make_model()[0].weight)


def test_a_part_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="no parameter's name starts with 'head'; they start with: 0, 1, 4"):
        Learner(make_model(), rated({"head": 1.0}), torch.tensor(RATES))
    with pytest.raises(ConfigError, match="freezes all parameters"):
        Learner(make_model(), rated({"": 0.0}), torch.tensor(RATES))


@pytest.mark.parametrize("rates", [{"": 0.0, "7.": 1.0}, {"7.": 3.0}])
def test_fine_tuning_a_part_resumes_to_the_same_bits(config_of, begin, resume, rates):
    config = config_of(optimizer={"name": "adam", "rates": rates})
    whole = begin(config, "whole")
    before = {name: t.clone() for name, t in whole.learner.model.state_dict().items()}
    whole.train()
    after = whole.learner.model.state_dict()
    assert not torch.equal(after["network.7.weight"], before["network.7.weight"])
    assert torch.equal(after["network.0.weight"], before["network.0.weight"]) == ("" in rates)
    stopped = begin(config)
    stop_at(stopped, 5)
    with pytest.raises(Interrupted):
        stopped.train()
    again = resume(config)
    again.train()
    assert_same_end(again, whole)


@pytest.mark.parametrize("name", ["trades", "n_aaer", "gradalign", "fgsm", "pgd"])
def test_no_method_ignores_label_smoothing(name):
    """The loss of the first update, on the same noise: smoothing raises it."""
    losses = []
    for smoothing in (0.0, 0.5):
        noise = on_noise(name)
        noise.step.learner.label_smoothing = smoothing
        losses.append(run_steps(noise, 1).losses[0])
    assert losses[0] != losses[1]


@pytest.mark.parametrize("method", [{"name": "liet"}, {"name": "awp", "of": {"name": "fgsm_uap"}}])
def test_a_method_with_smoothing_of_its_own_refuses_another(settings, tmp_path, method):
    with pytest.raises(ConfigError, match=r"this method has a key of its own, method.label_smoothing"):
        reading.parse(settings(tmp_path, method=method, label_smoothing=0.2), "test")
