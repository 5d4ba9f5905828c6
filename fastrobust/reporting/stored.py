"""What a run directory holds, read back and checked: for pages and tables about runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from fastrobust.runtime import run_directory
from fastrobust.runtime.errors import RunError
from fastrobust.runtime.files import explained

Kind = TypeVar("Kind")
Share = Annotated[float, Field(ge=0, le=1)]
Images = Annotated[int, Field(gt=0)]


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
    alignment: float | None = None
    went_back_to: int | None = None
    learning_rate: float | None = None
    images_per_second: float | None = None
    seconds: float = 0.0
    warning: str | None = None


class InBall(Stored):
    """A result that is about a ball. Of earlier versions it has no norm, and is of L-infinity."""

    norm: Literal["linf", "l2"] = "linf"
    epsilon: Annotated[float, Field(ge=0, allow_inf_nan=False)]

    @model_validator(mode="after")
    def _in_box(self):
        if self.norm == "linf" and self.epsilon > 1:
            raise ValueError(f"epsilon {self.epsilon:g} is outside the pixel range [0, 1]")
        return self


class Evaluation(InBall):
    attack: str
    clean_accuracy: Share
    robust_accuracy: Share
    examples: Images
    alpha: float | None = None
    arithmetic: str | None = None
    seconds: float = 0.0


class Environment(Stored):
    versions: dict[str, str] = {}
    hardware: dict[str, Any] = {}
    commit: str | None = None


class Summary(Environment):
    clean_accuracy: Share
    evaluations: Annotated[list[Evaluation], Field(min_length=1)]
    train_seconds: float
    epochs: int
    stopped: str | None
    recovered: list[dict[str, Any]] = []
    training_images: int | None = None
    test_images: str | None = None
    chosen: str | None = None
    tested_on: str = ""
    weights_sha256: str | None = None
    answers: list[float] | None = None
    resolution: int | None = None


@dataclass
class Run:
    """What a run directory holds. The report fills in the rest: `known`, the accuracies that are known of its weights, and
    `seen`, an Inspection, or None, where `unseen` says why."""

    name: str
    config: Any
    environment: Environment
    history: list[Epoch]
    summary: Summary | None
    known: Any = None
    seen: Any = None
    classes: tuple[str, ...] = ()
    unseen: str = ""


def read(path: Path, kind: type[Kind], lines: bool = False) -> Kind | None:
    """What a JSON file holds (with `lines`, the list of what its lines hold), or None without such a file. RunError."""
    if not path.is_file():
        return None
    with explained(f"{path} cannot be read"):
        text = path.read_text(encoding="utf-8")
    try:
        return TypeAdapter(kind).validate_json(f"[{','.join(text.splitlines())}]" if lines else text)
    except ValidationError as error:
        first = error.errors()[0]
        raise RunError(f"{path} is damaged: {'.'.join(map(str, first['loc']))} {first['msg'][:200]}") from None


def read_run(directory: str | Path) -> Run:
    """Raises RunError for what is not a run, or damaged."""
    path, config = run_directory.open_run(directory)
    environment = read(path / run_directory.ENVIRONMENT, Environment) or Environment()
    history = read(path / run_directory.METRICS, list[Epoch], lines=True) or []
    return Run(path.resolve().name, config, environment, history, read(path / run_directory.SUMMARY, Summary))
