"""`guard.action: recover`: what a run goes back to, what it goes on with, and the same bits after interruptions."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from training_runs import CPU, assert_same_end, same, stop_at, weights

from fastrobust.attack.verdicts import Verdicts
from fastrobust.config import reading
from fastrobust.reporting import export, report
from fastrobust.reporting.stored import read_run
from fastrobust.runtime import run_directory
from fastrobust.runtime.distributed import ALONE
from fastrobust.runtime.errors import ConfigError
from fastrobust.runtime.interrupt import Interrupted
from fastrobust.train import engine, guard, start
from fastrobust.train.methods.n_fgsm import NFgsm

RECOVER = {"guard": {"action": "recover"}}
FALLS = [True, False, True, True, True, True]  # which of the guard's looks find everything robust; the others nothing


@pytest.fixture
def looks(monkeypatch):
    """looks(list of bool): PGD finds all robust, or nothing, look by look. The list that it gives fills with the weights
    that were looked at."""

    def make(pattern):
        seen, pattern = [], itertools.chain(pattern, itertools.repeat(False))

        def made_up(model, images, labels, **settings):
            seen.append({name: t.clone() for name, t in model.state_dict().items()})
            everyone = torch.ones(len(labels), dtype=torch.bool)
            return Verdicts(everyone, everyone if next(pattern) else ~everyone)

        monkeypatch.setattr(guard, "pgd", made_up)
        monkeypatch.setattr(guard, "ENOUGH", 65)
        return seen

    return make


def run_of(begin, config, name="run"):
    job = begin(config, name)
    job.train()
    return job


def test_it_goes_back_and_on_with_n_fgsm(config_of, begin, looks, capsys):
    """The oracle: the same steps by hand, of which those of epoch 2 are forgotten (but not its place in the schedule)."""
    looks(FALLS)
    job = run_of(begin, config_of(**RECOVER))
    assert job.position.stopped is None and len(job.history) == 3
    assert [r.get(guard.WENT_BACK) for r in job.history] == [None, 1, None]
    told = "catastrophic overfitting: PGD accuracy on 65 training images fell from 100.0% to 0.0%; "
    told += "back to the weights of epoch 1, and on with n_fgsm, noise 2 epsilon, alpha 0.05"
    assert job.history[1]["warning"] == told and f"warning: {told}" in capsys.readouterr().out

    by_hand = begin(config_of(guard={"action": "off"}), "by hand")
    step, learner = by_hand.step, by_hand.learner
    for number, batch in enumerate(by_hand.loader.batches(0, 0, 20, 0, 10)):
        if number == 4:
            good = {k: t.clone() for k, t in learner.tensors().items() if not k.startswith("sums.")}
        if number == 7:
            for name, t in learner.tensors().items():
                if name in good:
                    t.detach().copy_(good[name])
            step.method = NFgsm(name="n_fgsm", noise=2.0, alpha=0.05)
        step(batch)
    assert same(weights(job), weights(by_hand))
    assert job.learner.lr == learner.lr and int(job.learner.updates) == 10


def test_the_summary_the_page_and_the_card_say_so(config_of, tmp_path, looks, capsys):
    looks(FALLS)
    made = config_of(**RECOVER, name="told")
    summary = start.run(made, tmp_path / "told", CPU, ALONE)
    assert summary["recovered"] == [{"epoch": 2, "went_back_to": 1, "method": "n_fgsm, noise 2 epsilon, alpha 0.05"}]
    stored = [json.loads(line) for line in (tmp_path / "told" / run_directory.METRICS).read_text().splitlines()]
    assert stored[1]["went_back_to"] == 1 and "back to the weights of epoch 1" in stored[1]["warning"]
    start.show_summary(summary, tmp_path / "told")
    told = "overfitting in epoch 2: back to epoch 1, and on with n_fgsm, noise 2 epsilon, alpha 0.05"
    assert told in capsys.readouterr().out
    run = read_run(tmp_path / "told")
    assert "It overfitted in epoch 2, went back to epoch 1, and on with n_fgsm" in export.training(run.config, run.summary)
    assert "epoch 2: catastrophic overfitting" in report.warnings(run)


@pytest.mark.parametrize("at", [3, 6, 9], ids=["before", "in the epoch that is undone", "after"])
def test_interrupted_runs_end_in_the_same_bits(at, config_of, begin, resume, looks):
    looks(FALLS)
    reference = run_of(begin, config_of(**RECOVER, epsilon_warmup=0), "reference")
    assert guard.recoveries(reference.history) == 1
    seen = looks(FALLS)
    job = begin(config_of(**RECOVER))
    stop_at(job, at)
    with pytest.raises(Interrupted):
        job.train()
    looks(FALLS[len(seen) :])
    again = resume(config_of(**RECOVER))
    again.train()
    assert_same_end(again, reference)
    assert again.step.method == reference.step.method == NFgsm(name="n_fgsm", noise=2.0, alpha=0.05)


def test_without_a_healthy_epoch_it_begins_anew(config_of, begin, looks, monkeypatch):
    looks([])
    judged = iter([("overfit", "made up"), None, None])
    monkeypatch.setattr(guard, "verdict", lambda *given: next(judged))
    job = begin(config_of(**RECOVER))
    fresh, undone = weights(job), []
    prepare = job.prepare_step
    job.prepare_step = lambda: (undone.append(weights(job)), prepare())
    job.train()
    assert job.history[0][guard.WENT_BACK] == 0 and "back to the weights of the start" in job.history[0]["warning"]
    assert len(undone) == 1 and same(undone[0], fresh)


def test_the_second_recovery_is_the_last(config_of, begin, looks):
    """N-FGSM, then PGD. What was undone is not compared with; then the run stops with the good weights."""
    seen = looks([True])
    job = run_of(begin, config_of(**RECOVER, phases__0__epochs=8))
    assert [r.get(guard.WENT_BACK) for r in job.history] == [None, 1, 1, None]
    assert [r["method"] for r in job.history[1:3]] == ["n_fgsm, noise 2 epsilon, alpha 0.05", "pgd-3, alpha 0.025"]
    assert "; the weights after epoch 1 are kept, after 2 recoveries. To train on" in job.position.stopped
    assert same(weights(job), seen[0])


def test_what_was_undone_is_not_compared_with():
    """Epoch 4 is judged against epoch 2, to which the run went back, and epoch 1 before it."""
    record = lambda epoch, guarded, **more: {
        **{"epoch": epoch, "phase": 0, "guard_epsilon": 0.1, "train_accuracy": 0.5},
        **{"guard_accuracy": guarded, "guard_clean_accuracy": 0.9},
        **more,
    }
    history = [record(1, 0.3), record(2, 0.4), record(3, 0.0, went_back_to=2), record(4, 0.35)]
    assert [r["epoch"] for r in guard.comparable(history)] == [1, 2, 4]
    again = [*history[:3], record(4, 0.0, went_back_to=1), record(5, 0.35)]
    assert [r["epoch"] for r in guard.comparable(again)] == [1, 5]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"name": "fgsm", "init": "zero", "attack_batchnorm": "eval"}, {"name": "n_fgsm", "noise": 2.0, "alpha": 0.1}),
        ({"name": "fgsm_uap"}, {"name": "n_fgsm", "noise": 2.0, "alpha": 0.1}),
        ({"name": "n_fgsm", "noise": 1.5, "alpha": 0.07}, {"name": "n_fgsm", "noise": 2.5, "alpha": 0.07}),
        ({"name": "n_aaer"}, {"name": "n_aaer", "noise": 3.0, "weight": 1.0}),
        ({"name": "liet"}, {"name": "liet", "noise": 3.0}),
    ],
)
def test_the_remedies(method, expected, config_of):
    config = config_of(**RECOVER, method=method, epsilon=0.1)
    found = guard.remedy(config.method, config.epsilon, 0)
    assert expected.items() <= found.model_dump().items()
    then = guard.remedy(found, config.epsilon, 1)
    assert (then.name, then.steps, then.alpha, then.init) == ("pgd", 3, 0.05, "random")
    assert then.batchnorm_in_attack == found.batchnorm_in_attack == config.method.batchnorm_in_attack
    around = config_of(**RECOVER, method={"name": "awp", "of": method}, epsilon=0.1)
    found = guard.remedy(around.method, around.epsilon, 0)
    assert found.name == "awp" and expected.items() <= found.of.model_dump().items() and found.gamma == around.method.gamma


@pytest.mark.parametrize(
    "method",
    [
        {"name": "free", "replays": 2},
        {"name": "pgd", "alpha": 0.01},
        {"name": "trades"},
        {"name": "fgsm", "ibp_weight": 0.1},
        {"name": "awp", "of": {"name": "trades"}},
    ],
)
def test_what_n_fgsm_is_no_substitute_for(method, settings, tmp_path):
    with pytest.raises(ConfigError, match=r"guard\.action: recover goes on with n_fgsm, which is no substitute for"):
        reading.parse(settings(tmp_path, method=method, **RECOVER), "test")


def test_the_step_is_prepared_anew(config_of, begin, looks, monkeypatch):
    """A graph that was recorded with the old method must not be replayed."""
    looks(FALLS)
    prepared, prepare = [], engine.prepare

    def noting(name, run, batch, owner):
        prepared.append(owner.method.name)
        method = owner.method

        def recorded(batch):
            assert owner.method is method
            run(batch)

        return prepare(name, recorded, batch, owner)

    monkeypatch.setattr(engine, "prepare", noting)
    run_of(begin, config_of(**RECOVER))
    assert prepared == ["fgsm", "n_fgsm"]
