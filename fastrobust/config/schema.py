"""The schema of a run: strict, typed, and written as people write it (`epsilon: 8/255`).

A `Config` has every default filled in, so that what is stored with a run says everything that the run did. Pixels are
in [0, 1]: epsilon and alpha are fractions of that range.
"""

from __future__ import annotations

import json
import math
import os
import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fastrobust.config import datasets, parts
from fastrobust.config.fields import Count, NonNegative, Number, Pixels, Section, some
from fastrobust.config.numbers import ball_in_words
from fastrobust.runtime.errors import ConfigError


def _mean(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(not 0 <= v <= 1 for v in values):
        raise ValueError("must lie in [0, 1]: pixels are divided by 255")
    return values


def _std(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(v <= 0 for v in values):
        raise ValueError("must be positive")
    return values


def _place(value: str) -> str:
    """A path with ~ and $VARIABLES written out."""
    path = os.path.expanduser(os.path.expandvars(value))
    if unset := re.search(r"\$\{?(\w+)", path):
        raise ValueError(f"the environment variable {unset[1]} is not set")
    if path.startswith("~"):
        raise ValueError(f"there is no home folder for '{path.split('/')[0]}'")
    return path


Place = Annotated[str, AfterValidator(_place)]


def _word(known: tuple[str, ...], value: str) -> str:
    """One of the known words, or `package.module:name`."""
    if ":" not in value and value not in known:
        raise ValueError(parts.unknown(value, known))
    return value


def _dataset(value: str) -> str:
    _word(tuple(datasets.DATASETS), value)
    try:
        datasets.facts(value)
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("data.dataset: ")) from None
    return value


def _loader(value: str) -> str:
    return _word(("auto", *parts.LOADERS), value)


def named(key: str, table: dict[str, str]) -> Any:
    """The type of a section whose `name` says which class of a table it is, or a class of the user's own."""

    def read(value: Any, info: ValidationInfo) -> Section:
        if isinstance(value, Section):
            return value
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str):
            raise ValueError("this section needs a `name`" if name is None else "its `name` must be a word")
        try:
            kind = parts.find_class(key, table, name)
        except ConfigError as error:
            raise ValueError(str(error).removeprefix(f"{key}: ")) from None
        return kind.model_validate(value, context=info.context)

    return Annotated[SerializeAsAny[Section], PlainValidator(read)]


class Augment(Section):
    """Applied on the training device, batch by batch. `pad` is the random crop with zero padding of the CIFAR-10 recipe."""

    crop: Literal["none", "pad", "random_resized"] = "none"
    padding: Count = 4
    flip: bool = False


class Data(Section):
    dataset: Annotated[str, AfterValidator(_dataset)]
    path: Place | None = None
    prepared: Place | None = None  # folder of prepared files; default: DATASET-ffcv or DATASET-dali beside the data sets
    workers: Count | None = None  # threads or processes that decode; default: one for each core
    download: bool = False
    limit: Count | None = None
    augment: Augment = Augment()


class Model(Section):
    """`mean` and `std` are in units of pixels in [0, 1]; the normalisation they describe is the model's first layer."""

    name: str
    mean: Annotated[tuple[Number, ...], AfterValidator(_mean)] | None = None
    std: Annotated[tuple[Number, ...], AfterValidator(_std)] | None = None


class Phase(Section):
    """`resolution` is the side of the images that the model sees; `resize` the short side of those they are cropped from."""

    epochs: Count
    batch_size: Count
    resolution: Count | None = None
    resize: Count | Literal["original"] | None = None


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML 1.1 reads `off` as false


class Guard(Section):
    """PGD on 512 training images after each epoch (paper, appendix B: on one minibatch): a fall of robust accuracy by more
    than `drop` from one epoch to the next is catastrophic overfitting. alpha defaults to epsilon / 4: 2/255 at 8/255."""

    action: Annotated[Literal["stop", "warn", "off"], BeforeValidator(_off)] = "stop"
    steps: Count = 5
    alpha: Pixels | None = None
    drop: Annotated[Number, Field(gt=0, lt=1)] = 0.2


class Evaluation(Section):
    """PGD on the test set. epsilon defaults to the training epsilon; alpha, one for each radius, to epsilon / 4."""

    epsilon: Annotated[tuple[Pixels, ...], AfterValidator(some)] | None = None
    alpha: Annotated[tuple[Pixels, ...], AfterValidator(some)] | None = None
    steps: Count = 50
    restarts: Count = 10
    batch_size: Count = 500
    limit: Count | None = None

    @field_validator("epsilon", "alpha", mode="before")
    @classmethod
    def _one_value(cls, value: Any) -> Any:
        return [value] if isinstance(value, (int, float, str)) else value

    def alpha_at(self, epsilon: float) -> float:
        """The step size of PGD at a radius: the config's for a radius that stands there, else a quarter of it."""
        return dict(zip(self.epsilon, self.alpha, strict=True)).get(epsilon, epsilon / 4)


class Config(Section):
    name: Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    output: Place = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**31, strict=True)] = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    engine: Literal["auto", "eager", "compile", "cuda_graph", "compile+cuda_graph"] = "auto"
    loader: Annotated[str, AfterValidator(_loader)] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    deterministic: bool = False  # the same bits every time, on a GPU at some cost; on a CPU the threads are kept
    norm: Literal["linf", "l2"] = "linf"  # of the ball; epsilon and all alpha are in its units
    epsilon: Pixels
    epsilon_warmup: NonNegative = 0.0  # epochs over which epsilon and alpha grow linearly from 0
    data: Data
    model: Model
    method: named("method", parts.METHODS)
    optimizer: named("optimizer", parts.OPTIMIZERS)
    schedule: named("schedule", parts.SCHEDULES)
    phases: Annotated[tuple[Phase, ...], AfterValidator(some)]
    guard: Guard = Guard()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _fill_in(self):
        """Resolve every default that depends on another key, and refuse what cannot be meant."""
        data, augment, evaluation = self.data, self.data.augment, self.evaluation
        self.method.resolve(self.epsilon)
        if self.method.attacks and self.epsilon == 0:
            raise ValueError("epsilon is 0: use `method: {name: standard}` for training without an attack")
        if self.norm != "linf" and self.method.needs_box:
            raise ValueError(f"norm is {self.norm}, but method.ibp_weight bounds the L-infinity ball alone: use norm: linf")
        if self.epsilon_warmup > self.epochs:
            raise ValueError(f"epsilon_warmup is {self.epsilon_warmup:g} epochs, but the phases last {self.epochs}")
        if self.guard.alpha is None:
            self.guard.alpha = self.epsilon / 4
        if evaluation.epsilon is None:
            evaluation.epsilon = (self.epsilon,)
        if evaluation.alpha is None:
            evaluation.alpha = tuple(epsilon / 4 for epsilon in evaluation.epsilon)
        if len(evaluation.alpha) == 1:
            evaluation.alpha *= len(evaluation.epsilon)
        if len(evaluation.alpha) != len(evaluation.epsilon):
            counts = f"{len(evaluation.alpha)} values for the {len(evaluation.epsilon)} of evaluation.epsilon"
            raise ValueError(f"evaluation.alpha has {counts}: give one value, or one for each radius")
        self.model.mean = self.facts.mean if self.model.mean is None else self.model.mean
        self.model.std = self.facts.std if self.model.std is None else self.model.std
        channels, native = self.facts.channels, self.facts.size
        if len(self.model.mean) != channels or len(self.model.std) != channels:
            raise ValueError(f"model.mean and model.std need {channels} value(s) for {data.dataset}")
        for i, phase in enumerate(self.phases):
            if native is None and phase.resolution is None:
                raise ValueError(f"phases.{i}.resolution is needed for {data.dataset}: the side of the training images")
            phase.resolution = phase.resolution or native
            phase.resize = phase.resize or (native or phase.resolution)
            if native is not None and phase.resize != native:
                raise ValueError(f"phases.{i}.resize is {phase.resize}, but {data.dataset} images are {native} pixels wide")
            if augment.crop != "random_resized" and phase.resolution != phase.resize:
                raise ValueError(
                    f"phases.{i}: a resolution of {phase.resolution} out of images of {phase.resize} needs "
                    "data.augment.crop: random_resized"
                )
        if self.norm == "l2":
            self._check_l2_radii(max(phase.resolution for phase in self.phases))
        self.schedule.check(self.epochs)
        return self

    def _check_l2_radii(self, side: int) -> None:
        """No two images are further apart than the diagonal of the pixel box."""
        widest = math.sqrt(self.facts.channels * side * side)
        for key, radii in (("epsilon", (self.epsilon,)), ("evaluation.epsilon", self.evaluation.epsilon)):
            if max(radii) > widest:
                apart = f"no two images of {side} x {side} pixels are further apart than {widest:.4g} in L2"
                raise ValueError(f"{key} is {max(radii):g}, but {apart}; did you mean {max(radii):g}/255?")

    @property
    def epochs(self) -> int:
        """Epochs as the paper counts them: for `free`, replays of a minibatch count as epochs."""
        return sum(phase.epochs for phase in self.phases)

    @property
    def replays(self) -> int:
        return self.method.updates_per_batch

    @property
    def facts(self) -> datasets.Dataset:
        """What is fixed about the data set."""
        return datasets.facts(self.data.dataset)

    def passes(self, phase: Phase) -> int:
        """Passes over the data in a phase: its epochs, divided by the replays of `free` and rounded up."""
        return math.ceil(phase.epochs / self.replays)

    def in_words(self) -> str:
        """The method, its hyperparameters and the radius."""
        radius = f", {ball_in_words(self.epsilon, self.norm)}" if self.method.attacks else ""
        if radius and self.epsilon_warmup:
            radius += f", reached from 0 in {self.epsilon_warmup:g} epochs"
        return self.method.describe() + radius

    def to_dict(self) -> dict[str, Any]:
        return json.loads(self.model_dump_json())

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=120)
