"""What a run directory holds, read back and checked: for pages and tables about runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from fastrobust.reporting.known import Known
from fastrobust.runtime import run_directory
from fastrobust.runtime.errors import RunError
from fastrobust.runtime.files import explained


class Stored(BaseModel):
    """A file of a run directory, as far as it is used here."""

    model_config = ConfigDict(extra="allow")


class Epoch(Stored):
    epoch: int
    loss: float | None = None
    train_accuracy: float | None = None
    guard_clean_accuracy: float | None = None
    guard_accuracy: float | None = None
    guard_images: int | None = None
    learning_rate: float | None = None
    images_per_second: float | None = None
    seconds: float = 0.0
    warning: str | None = None


class Evaluation(Stored):
    attack: str
    norm: str = "linf"
    epsilon: float
    robust_accuracy: Annotated[float, Field(ge=0, le=1)]
    examples: Annotated[int, Field(gt=0)]
    seconds: float = 0.0


class Summary(Stored):
    clean_accuracy: Annotated[float, Field(ge=0, le=1)]
    evaluations: Annotated[list[Evaluation], Field(min_length=1)]
    train_seconds: float
    epochs: int
    stopped: str | None


class Environment(Stored):
    versions: dict[str, str] = {}
    hardware: dict[str, Any] = {}
    commit: str | None = None


@dataclass
class Run:
    """What a run directory holds. `known`: the accuracies that are known of its weights, filled in by the report. `seen` is
    an Inspection, or None, and `unseen` says why."""

    name: str
    config: Any
    environment: Environment
    history: list[Epoch]
    summary: Summary | None
    known: Known = field(default_factory=Known)
    seen: Any = None
    classes: tuple[str, ...] = ()
    unseen: str = ""


def read_run(directory: str | Path) -> Run:
    """Raises RunError for what is not a run, or damaged."""

    path, config = run_directory.open_run(directory)

    def read(name: str, kind: type[Stored], lines: bool = False) -> list:
        if not (path / name).is_file():
            return []
        with explained(f"{path / name} cannot be read"):
            text = (path / name).read_text(encoding="utf-8")
        try:
            return [kind.model_validate(json.loads(part)) for part in (text.splitlines() if lines else [text])]
        except (ValueError, RecursionError) as error:
            raise RunError(f"{path / name} is damaged: {' '.join(str(error).split())[:200]}") from None

    environment, summary = read("environment.json", Environment), read(run_directory.SUMMARY, Summary)
    return Run(
        name=path.resolve().name,
        config=config,
        environment=environment[0] if environment else Environment(),
        history=read(run_directory.METRICS, Epoch, lines=True),
        summary=summary[0] if summary else None,
    )
