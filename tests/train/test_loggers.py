"""Where the figures of a training go: TensorBoard, W&B and MLflow where they are installed, and a logger of one's own."""

from __future__ import annotations

import json
import sys
import time

import pytest
from training_runs import same, stop_at, weights

from fastrobust.config import parts
from fastrobust.runtime.errors import ConfigError
from fastrobust.runtime.interrupt import Interrupted
from fastrobust.train.loggers import IDS, Logger, needed

SEEN: list = []


class Kept(Logger):
    def __init__(self, directory, config, history):
        SEEN.append(("begin", config.name, [record["epoch"] for record in history]))

    def log(self, record, updates):
        SEEN.append((updates, record))

    def close(self):
        SEEN.append("end")


class Broken(Kept):
    """Fails where `fails` says."""

    fails = ""

    def __init__(self, directory, config, history):
        super().__init__(directory, config, history)
        self.fail("begin")

    def fail(self, where):
        if Broken.fails == where:
            raise ConnectionError("the server is away\nand more")

    def log(self, record, updates):
        super().log(record, updates)
        self.fail("log")

    def close(self):
        super().close()
        self.fail("end")


class Silent(Logger):
    """Logs nothing: it has no `log`."""


@pytest.fixture(autouse=True)
def nothing_seen():
    SEEN.clear()


def test_a_logger_gets_the_figures_of_every_epoch_once(config_of, begin, resume):
    config = config_of(logging=["test_loggers:Kept"])
    job = begin(config)
    stop_at(job, 6)
    with pytest.raises(Interrupted):
        job.train()
    job = resume(config)
    job.train()
    logged = [entry for entry in SEEN if entry[0] not in ("begin", "e")]
    assert [updates for updates, _ in logged] == [record["updates"] for record in job.history]
    for (_, record), whole in zip(logged, job.history, strict=True):
        assert record == {key: whole[key] for key in record} and {"loss", "guard_accuracy", "learning_rate"} <= record.keys()
    assert [entry for entry in SEEN if entry[0] == "begin"] == [("begin", config.name, []), ("begin", config.name, [1])]
    assert SEEN.count("end") == 2 and list(job.directory.glob("events.out.tfevents.*")) == []


@pytest.mark.parametrize("where", ["begin", "log", "end"])
def test_a_logger_that_fails_ends_alone(config_of, begin, capsys, monkeypatch, where):
    monkeypatch.setattr(Broken, "fails", where)
    reference = begin(config_of(logging=[]), "reference")
    reference.train()
    job = begin(config_of(logging=["test_loggers:Broken", "tensorboard"]))
    job.train()
    assert same(weights(job), weights(reference)) and len(job.history) == 3
    said = "warning: logging to test_loggers:Broken has ended: ConnectionError: the server is away"
    assert capsys.readouterr().out.count(said) == 1
    assert len(list(job.directory.glob("events.out.tfevents.*"))) == 1
    assert sum(isinstance(entry[0], int) for entry in SEEN) == {"begin": 0, "log": 1, "end": 3}[where]


def test_names_of_loggers_are_checked(config_of):
    with pytest.raises(
        ConfigError, match=r"logging.*'wandbb' is not one of tensorboard, wandb, mlflow; did you mean 'wandb'"
    ):
        config_of(logging=["wandbb"])
    with pytest.raises(ConfigError, match="logging: 'test_loggers:Silent' lacks log"):
        parts.find_class("logging", parts.LOGGERS, "test_loggers:Silent")
    assert config_of(logging="tensorboard").logging == config_of().logging == ("tensorboard",)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_an_error_before_the_first_epoch(config_of, begin, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    job = begin(config_of(logging=["tensorboard", name]))
    with pytest.raises(ConfigError, match=rf"^logging: {name} is not installed .*: pip install {name}.*, or leave it out$"):
        job.train()
    assert job.history == []
    with pytest.raises(ConfigError, match="pip install wandb, or"):
        monkeypatch.setitem(sys.modules, "wandb", None)
        needed("wandb")


def test_wandb_offline(config_of, begin, resume, monkeypatch):
    """The real package writes files with the figures, for `wandb sync`."""
    pytest.importorskip("wandb", reason="needs wandb")

    monkeypatch.setenv("WANDB_MODE", "offline")
    job = begin(config_of(logging=["wandb"]))
    stop_at(job, 6)
    with pytest.raises(Interrupted):
        job.train()
    name = json.loads((job.directory / IDS).read_text())["wandb"]
    time.sleep(1.1)  # the names of its folders have seconds
    job = resume(config_of(logging=["wandb"]))
    job.train()
    assert json.loads((job.directory / IDS).read_text())["wandb"] == name
    files = sorted(job.directory.rglob(f"run-{name}.wandb"))
    assert len(files) == 2  # the second goes on with the first
    until = time.monotonic() + 20
    while not all(b"guard_accuracy" in file.read_bytes() for file in files):  # its service writes them
        assert time.monotonic() < until
        time.sleep(0.1)


def test_mlflow_offline(config_of, begin, resume, monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path}/mlruns")
    job = begin(config_of(logging=["mlflow"]))
    stop_at(job, 6)
    with pytest.raises(Interrupted):
        job.train()
    job = resume(config_of(logging=["mlflow"]))
    job.train()
    assert mlflow.active_run() is None
    name = json.loads((job.directory / IDS).read_text())["mlflow"]
    client = mlflow.MlflowClient()
    history = client.get_metric_history(name, "guard_accuracy")
    assert {m.step: m.value for m in history} == {r["updates"]: r["guard_accuracy"] for r in job.history}
    run = client.get_run(name)
    assert run.data.params["epsilon"] == str(job.config.epsilon) and run.info.status == "FINISHED"
