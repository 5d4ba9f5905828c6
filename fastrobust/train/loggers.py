"""Where the figures of a training go, besides the run's own files: `logging` in a config.

A logger of one's own derives from `Logger` and is named `package.module:Class`.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from fastrobust.config.reading import flatten
from fastrobust.config.schema import Config
from fastrobust.runtime.errors import ConfigError
from fastrobust.runtime.files import write_json

IDS = "logging.json"  # in the run directory: under which names other programs know the run


class Logger(ABC):
    """Made when a training begins or goes on, in process 0 alone. `history` has what was logged before, one record an epoch.
    What it raises is said in one line, and the training goes on without it; only a ConfigError ends it."""

    def __init__(self, directory: Path, config: Config, history: list[dict[str, Any]]):
        """A logger may keep what it needs of these."""
        super().__init__()

    @classmethod
    def check(cls) -> Any:
        """Raise ConfigError where it cannot be used on this machine. Called before there is a run directory."""
        return None

    @abstractmethod
    def log(self, record: dict[str, float], updates: int) -> None:
        """The figures after so many weight updates."""

    def close(self) -> None:
        """The training ends, or stops."""
        return None


class TensorBoard(Logger):
    """Events in the run directory, written anew from the history: TensorBoard orders files by the clock, which may have been
    changed."""

    def __init__(self, directory: Path, config: Config, history: list[dict[str, Any]]):
        from torch.utils.tensorboard import SummaryWriter  # its import takes longer than a short run's first epoch

        for old in directory.glob("events.out.tfevents.*"):
            old.unlink()
        self.writer = SummaryWriter(str(directory))
        for record in history:
            self.log(figures(record), record["updates"])

    def log(self, record: dict[str, float], updates: int) -> None:
        for name, value in record.items():
            self.writer.add_scalar(name, value, updates)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb(Logger):
    """A run of Weights & Biases, in its project `fastrobust` or $WANDB_PROJECT; WANDB_MODE=offline writes files alone."""

    @classmethod
    def check(cls) -> Any:
        return needed("wandb")

    def __init__(self, directory: Path, config: Config, history: list[dict[str, Any]]):
        wandb = self.check()
        settings = wandb.Settings(console="off")  # the progress bar owns the terminal
        about = {"name": config.name, "config": config.to_dict(), "dir": str(directory), "settings": settings}
        before = {"id": ids(directory).get("wandb"), "resume": "allow"} if history else {}
        self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", "fastrobust"), **about, **before)
        remember(directory, wandb=self.run.id)

    def log(self, record: dict[str, float], updates: int) -> None:
        self.run.log(record, step=updates)

    def close(self) -> None:
        self.run.finish()


class Mlflow(Logger):
    """A run of MLflow, where MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say."""

    @classmethod
    def check(cls) -> Any:
        return needed("mlflow", "mlflow or mlflow-skinny")

    def __init__(self, directory: Path, config: Config, history: list[dict[str, Any]]):
        self.mlflow = self.check()
        known = ids(directory).get("mlflow") if history else None
        run = self.mlflow.start_run(run_id=known, run_name=config.name, nested=self.mlflow.active_run() is not None)
        self.id = run.info.run_id
        self.client = self.mlflow.MlflowClient()
        remember(directory, mlflow=self.id)
        if known is None:
            for key, value in flatten(config.to_dict()).items():
                self.client.log_param(self.id, key, value)

    def log(self, record: dict[str, float], updates: int) -> None:
        for name, value in record.items():
            self.client.log_metric(self.id, name, value, step=updates)

    def close(self) -> None:
        self.mlflow.end_run()


def figures(record: dict[str, Any]) -> dict[str, float]:
    """What of an epoch's record is drawn."""
    others = {"epoch", "phase", "updates", "warning", "guard_images", "went_back_to", "method"}
    return {name: record[name] for name in sorted(record.keys() - others)}


def needed(module: str, packages: str = "") -> Any:
    """The module, or a ConfigError that says what to install."""
    try:
        return __import__(module)
    except ImportError as error:
        advice = f"pip install {packages or module}, or leave it out"
        raise ConfigError(f"logging: {module} is not installed ({error}): {advice}") from None


def ids(directory: Path) -> dict[str, str]:
    """Under which names other programs know the run; none where that was not kept."""
    try:
        return json.loads((directory / IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def remember(directory: Path, **names: str) -> None:
    write_json(directory / IDS, ids(directory) | names)
