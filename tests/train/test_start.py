"""Tests of fastrobust.train.start: one function starts, resumes or skips a run, and refuses what is not this run."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from training_runs import CPU, METHODS, same

from fastrobust.attack.pgd import Pgd
from fastrobust.config import reading
from fastrobust.evaluation import accuracy
from fastrobust.models.weights import read_weights
from fastrobust.runtime import run_directory
from fastrobust.runtime.distributed import ALONE
from fastrobust.runtime.errors import ConfigError, RunError
from fastrobust.runtime.interrupt import Interrupted
from fastrobust.train import start, training

FINISHED = {"checkpoint.pt", "config.yaml", "environment.json", "metrics.jsonl", "model.safetensors", "summary.json"}


@pytest.fixture
def config(settings, few_bars, tmp_path):
    """config(name, **changes) -> the Config of a run of 4 + 3 updates, as the user wrote it, with `auto` left open."""

    def make(name="bars", **changes):
        small = {
            "data__path": str(few_bars),
            "data__limit": 65,
            "phases": [{"epochs": 2, "batch_size": 20, "resolution": 28}],
            "evaluation": {"steps": 2, "restarts": 1, "limit": 10},
            **METHODS["fgsm previous"],
        }
        return reading.parse(settings(tmp_path, **(small | changes)) | {"name": name}, "test")

    return make


def directory_of(config) -> Path:
    return Path(config.output) / config.name


def run(config, **options) -> dict:
    torch.manual_seed(987)  # whatever the state of the generator is
    return start.run(config, directory_of(config), CPU, ALONE, **options)


def without_times(summary: dict) -> dict:
    times = ("train_seconds", "seconds_per_epoch", "evaluation_seconds", "name")
    plain = {key: value for key, value in summary.items() if key not in times}
    lists = {key: value for key, value in plain.items() if key.startswith("evaluations")}
    return plain | {key: [{k: v for k, v in e.items() if k != "seconds"} for e in found] for key, found in lists.items()}


def weights_of(config) -> dict:
    return read_weights(directory_of(config))[0].state_dict()


def contents(directory: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.fixture
def stop_after(monkeypatch):
    """stop_after(n) -> the next run gets a signal in its step n."""

    def arrange(at):
        took = training.Training._train_pass

        def watched(self, *arguments):
            take, begun = self.step.take, []

            def step(batch):
                begun.append(1)
                if len(begun) == at:
                    self._note_signal(signal.SIGTERM, None)
                take(batch)

            self.step.take = step
            monkeypatch.setattr(training.Training, "_train_pass", took)
            return took(self, *arguments)

        monkeypatch.setattr(training.Training, "_train_pass", watched)

    return arrange


# ---- starting


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_leaves_no_run(config, monkeypatch, name):
    """So that the same command works once it is installed, or left out."""
    monkeypatch.setitem(sys.modules, name, None)
    wanted = config(logging=["tensorboard", name])
    with pytest.raises(ConfigError, match=rf"^logging: {name} is not installed .*: pip install {name}.*, or leave it out$"):
        run(wanted)
    assert not directory_of(wanted).exists()


def test_a_run_is_started_to_its_end(config):
    summary = run(config())
    directory = directory_of(config())
    assert {file.name for file in directory.iterdir()} >= FINISHED
    assert summary == json.loads((directory / run_directory.SUMMARY).read_text())
    assert summary["epochs"] == 2 and summary["examples"] == 10 and summary["processes"] == 1
    stored = run_directory.open_run(directory)[1]
    assert (stored.loader, stored.engine) == ("resident", "eager"), "nothing is left open in what is stored"
    assert (summary["loader"], summary["engine"]) == ("resident", "eager")


def test_what_cannot_be_trained_leaves_no_directory(config):
    with pytest.raises(ConfigError, match=r"phases\.0\.batch_size is 66, but there are only 65 images"):
        run(config(phases=[{"epochs": 1, "batch_size": 66, "resolution": 28}]))
    assert not directory_of(config()).exists()


def test_a_run_that_is_there_is_refused_unless_it_may_go_on(config, stop_after):
    stop_after(3)
    with pytest.raises(Interrupted):
        run(config())
    before = contents(directory_of(config()))
    with pytest.raises(RunError, match=r"holds a run already; continue it with `--resume .*bars`"):
        run(config())
    assert contents(directory_of(config())) == before


def test_of_two_starts_at_once_one_makes_the_run(config, monkeypatch):
    """The second begins while the first writes its directory: its config must not take the first one's place."""
    first, second = (start.resolve(config(seed=seed), CPU, ALONE) for seed in (1, 2))
    facts, told = run_directory.environment, []

    def meanwhile(device):
        monkeypatch.setattr(run_directory, "environment", facts)
        with pytest.raises(RunError) as caught:
            run_directory.create(second)
        told.append(str(caught.value))
        return facts(device)

    monkeypatch.setattr(run_directory, "environment", meanwhile)
    run_directory.create(first)
    assert len(told) == 1 and "is being trained by another process" in told[0]
    assert run_directory.open_run(directory_of(first))[1].seed == 1


# ---- resuming


@pytest.mark.parametrize("at", [2, 4, 6], ids=["in epoch 1", "at its end", "in epoch 2"])
def test_a_stopped_run_is_resumed_to_the_same_end(config, stop_after, capsys, at):
    expected = run(config("undisturbed"))
    stop_after(at)
    with pytest.raises(Interrupted, match="--resume"):
        run(config())
    assert not (directory_of(config()) / run_directory.SUMMARY).exists()
    capsys.readouterr()
    found = run(config(), again=True)
    assert f"going on after {at} updates" in capsys.readouterr().out
    assert without_times(found) == without_times(expected)
    assert same(weights_of(config()), weights_of(config("undisturbed")))


def test_an_interrupted_evaluation_goes_on_where_it_was(config, monkeypatch):
    """Averaged weights first, then the trained ones: no batch is attacked twice."""
    changes = {"averaging": {"decay": 0.9}, "evaluation": {"steps": 2, "restarts": 3, "batch_size": 5}}
    attack, calls, stop_at = Pgd.run, [], set()

    def watched(self, x, y, begin):
        if len(calls) in stop_at:
            stop_at.discard(len(calls))
            raise KeyboardInterrupt
        calls.append(x.clone())
        return attack(self, x, y, begin)

    monkeypatch.setattr(accuracy, "SAVE_EVERY", -1.0)
    monkeypatch.setattr(Pgd, "run", watched)
    expected, undisturbed = run(config("undisturbed", **changes)), list(calls)
    calls.clear()
    assert len(undisturbed) >= 6
    stop_at.update({1, len(undisturbed) - 1})
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(config(**changes), again=True)
        assert not (directory_of(config()) / run_directory.SUMMARY).exists()
    found = run(config(**changes), again=True)
    assert without_times(found) == without_times(expected)
    assert len(calls) == len(undisturbed) and all(torch.equal(a, b) for a, b in zip(calls, undisturbed, strict=True))


def test_a_run_without_a_checkpoint_starts_from_the_beginning(config, capsys):
    expected = run(config("undisturbed"))
    run_directory.create(start.resolve(config(), CPU, ALONE))
    capsys.readouterr()
    found = run(config(), again=True)
    assert "has no checkpoint yet: starting from the beginning" in capsys.readouterr().out
    assert without_times(found) == without_times(expected)
    assert same(weights_of(config()), weights_of(config("undisturbed")))


def test_with_again_a_run_that_is_not_there_is_started(config):
    assert run(config(), again=True)["epochs"] == 2
    assert {file.name for file in directory_of(config()).iterdir()} >= FINISHED


@pytest.mark.parametrize("begun", ["cuda_graph", "auto"])
def test_a_run_begun_on_a_gpu_goes_on_on_a_cpu(config, stop_after, begun):
    """Its config says that steps are recorded as a graph, which a CPU cannot do; `auto` is what older runs hold."""
    run(config("undisturbed"))
    stop_after(5)
    with pytest.raises(Interrupted):
        run(config())
    directory = directory_of(config())
    stored = run_directory.open_run(directory)[1].model_copy(update={"engine": begun, "device": "auto"})
    (directory / run_directory.CONFIG).write_text(stored.to_yaml())
    tensors, facts = run_directory.load_checkpoint(directory)
    run_directory.save_checkpoint(directory, tensors, facts | {"config": stored.to_dict()})
    found = start.run(run_directory.open_run(directory)[1], directory, CPU, ALONE, again=True)
    assert found["engine"] == "eager"
    assert same(weights_of(config()), weights_of(config("undisturbed")))


# ---- skipping


def test_a_finished_run_is_left_as_it_is(config, monkeypatch):
    expected = run(config())
    before = contents(directory_of(config()))
    monkeypatch.setattr(training, "Training", None)  # nothing is trained, no data are read
    monkeypatch.setattr(start, "Training", None)
    assert run(config(), again=True) == expected
    assert contents(directory_of(config())) == before


def test_a_damaged_summary_is_an_explained_error(config):
    run(config())
    (directory_of(config()) / run_directory.SUMMARY).write_text("{")
    with pytest.raises(RunError, match=r"summary\.json is damaged: delete it, and --resume evaluates again"):
        run(config(), again=True)
    (directory_of(config()) / run_directory.SUMMARY).unlink()
    assert run(config(), again=True)["epochs"] == 2


# ---- another config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, "seed: 0 in one, 3 in the other"),
        ({"epsilon": 0.1}, "epsilon: 0.05 in one, 0.1 in the other"),
        ({"engine": "compile"}, "engine: eager in one, compile in the other"),
        ({"loader": "torch"}, "loader: resident in one, torch in the other"),
        ({"evaluation__steps": 5}, r"evaluation\.steps: 2 in one, 5 in the other"),
    ],
)
def test_another_config_is_refused_finished_or_not(config, stop_after, changes, message):
    stop_after(3)
    with pytest.raises(Interrupted):
        run(config())
    for _ in range(2):
        before = contents(directory_of(config()))
        with pytest.raises(RunError, match=f"(?s)was begun with another config.*{message}.*Move it away"):
            run(config(**changes), again=True)
        assert contents(directory_of(config())) == before
        run(config(), again=True)  # it is finished the second time


@pytest.mark.parametrize("changes", [{"engine": "eager"}, {"loader": "resident"}, {"engine": "eager", "loader": "resident"}])
def test_what_one_config_leaves_to_the_run_is_no_difference(config, stop_after, changes):
    """The stored config has what `auto` stood for. Either of the two may say so, or leave it open."""
    stop_after(3)
    with pytest.raises(Interrupted):
        run(config())
    assert run(config(**changes), again=True)["epochs"] == 2

    open_one = config("open", **changes)
    run_directory.create(open_one)  # as an older run that did not store its choice
    assert run(config("open"), again=True)["epochs"] == 2
