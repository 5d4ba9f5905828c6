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
from fastrobust.config.fields import Count, FolderName, NonNegative, Number, Pixels, Positive, Section, some
from fastrobust.config.numbers import ball_in_words
from fastrobust.runtime.errors import ConfigError


def _place(value: str) -> str:
    """A path with ~ and $VARIABLES written out."""
    path = os.path.expanduser(os.path.expandvars(value))
    if unset := re.search(r"\$\{?(\w+)", path):
        raise ValueError(f"the environment variable {unset[1]} is not set")
    if path.startswith("~"):
        raise ValueError(f"there is no home folder for '{path.split('/')[0]}'")
    return path


Place = Annotated[str, AfterValidator(_place)]


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError(f"'{value}' is none of auto, cpu, cuda and cuda:NUMBER")
    return value


def _word(known: tuple[str, ...], value: str) -> str:
    """One of the known words, or `package.module:name`."""
    if ":" not in value and value not in known:
        raise ValueError(parts.unknown(value, known))
    return value


def _dataset(value: str) -> str:
    _word((*datasets.DATASETS, *datasets.FROM_FILES), value)
    try:
        datasets.find(value)
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("data.dataset: ")) from None
    return value


def _loader(value: str) -> str:
    return _word(("auto", *parts.LOADERS), value)


def _logger(value: str) -> str:
    return _word(tuple(parts.LOGGERS), value)


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
    """Applied on the training device, batch by batch. `pad` is the random crop with zero padding of the CIFAR-10 recipe.
    mixup, cutmix: alpha of the Beta distribution that an image's share is drawn from; 0 is without."""

    crop: Literal["none", "pad", "random_resized"] = "none"
    padding: Count = 4
    border: Literal["zeros", "reflect"] = "zeros"  # what comes in at the edges of `pad`
    flip: Literal[False, True, "alternate"] = False
    randaugment: Annotated[int, Field(ge=0, le=10, strict=True)] = 0  # operations on each image
    magnitude: Annotated[int, Field(ge=0, le=30, strict=True)] = 9  # of those
    cutout: Annotated[int, Field(ge=0, strict=True)] = 0  # side of the square that is blackened, in pixels
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0

    @property
    def mixes(self) -> str:
        """Which key gives images the labels of two; empty if none does."""
        return "mixup" if self.mixup else "cutmix" if self.cutmix else ""


class Data(Section):
    dataset: Annotated[str, AfterValidator(_dataset)]
    path: Place | None = None
    prepared: Place | None = None  # folder of prepared files; default: DATASET-ffcv or DATASET-dali beside the data sets
    workers: Count | None = None  # threads or processes that decode; default: one for each core
    download: bool = False
    limit: Count | None = None
    held_out: Annotated[int, Field(ge=0, strict=True)] = 0  # training images that are never trained on
    seed: Annotated[int, Field(ge=0, lt=2**31, strict=True)] = 0  # of which those are
    labels: Place | None = None  # a CSV file with columns file, label, and perhaps split
    skip_corrupt: bool = False  # leave out images that cannot be decoded
    balance: bool = False  # every class equally often, whatever the number of its images
    channels: Literal[1, 3] | None = None  # default: 1 where the files of an image folder are grey
    augment: Augment = Augment()


class Model(Section):
    """`mean` and `std` are in units of pixels in [0, 1]; the normalisation they describe is the model's first layer.
    Training starts with the `weights` of a file or run; a last layer for other classes is replaced by a new one."""

    name: str
    options: dict[str, str | bool | int | float] | None = None  # further arguments of the model
    weights: Annotated[Place, AfterValidator(os.path.abspath)] | None = None
    mean: tuple[Pixels, ...] | None = None
    std: tuple[Positive, ...] | None = None


class Phase(Section):
    """`resolution` is the side of the images that the model sees; `resize` the short side of those they are cropped from. A
    batch passes through the model in `accumulate` parts, whose gradients are averaged for its one update."""

    epochs: Count
    batch_size: Count
    accumulate: Count = 1
    resolution: Count | None = None
    resize: Count | Literal["original"] | None = None


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML 1.1 reads `off` as false


class Guard(Section):
    """PGD on 512 training images after each epoch (paper, appendix B: on one minibatch): a fall of robust accuracy by more
    than `drop` from one epoch to the next is catastrophic overfitting. alpha defaults to epsilon / 4: 2/255 at 8/255."""

    action: Annotated[Literal["stop", "recover", "warn", "off"], BeforeValidator(_off)] = "stop"
    steps: Count = 5
    alpha: Pixels | None = None
    drop: Annotated[Number, Field(gt=0, lt=1)] = 0.2


class Averaging(Section):
    """Averaged weights beside the trained ones: mean <- decay mean + (1 - decay) weights after every update, with less decay
    in the first ones. 0.999 for 15 to 30 epochs, 0.9995 for 100."""

    decay: Annotated[Number, Field(gt=0, lt=1)] = 0.999


class Selection(Section):
    """PGD on the held-out images after every so many epochs, at the full epsilon; the run ends with the weights, trained or
    averaged, that stood it best. alpha defaults to epsilon / 4."""

    steps: Count = 10
    alpha: Pixels | None = None
    every: Count = 1


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
    name: FolderName
    output: Place = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**31, strict=True)] = 0
    device: Annotated[str, AfterValidator(_device)] = "auto"
    engine: Literal["auto", "eager", "compile", "cuda_graph", "compile+cuda_graph", "fused", "fused+cuda_graph"] = "auto"
    loader: Annotated[str, AfterValidator(_loader)] = "auto"
    logging: Annotated[tuple[Annotated[str, AfterValidator(_logger)], ...], BeforeValidator(_listed)] = ("tensorboard",)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    deterministic: bool = False  # the same bits every time, on a GPU at some cost; on a CPU the threads are kept
    norm: Literal["linf", "l2"] = "linf"  # of the ball; epsilon and all alpha are in its units
    epsilon: Pixels
    epsilon_warmup: NonNegative = 0.0  # epochs over which epsilon and alpha grow linearly from 0
    data: Data
    model: Model
    method: named("method", parts.METHODS)
    optimizer: named("optimizer", parts.OPTIMIZERS)
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = (
        0.0  # share of each label spread over all classes, attack and update
    )
    clip_gradients: Positive | None = None  # the largest norm of all weight gradients together
    averaging: Averaging | None = None
    schedule: named("schedule", parts.SCHEDULES)
    phases: Annotated[tuple[Phase, ...], AfterValidator(some)]
    guard: Guard = Guard()
    selection: Selection | None = None
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _fill_in(self):
        """Resolve every default that depends on another key, and refuse what cannot be meant."""
        data, augment, evaluation = self.data, self.data.augment, self.evaluation
        self.method.resolve(self.epsilon)
        if self.method.attacks and self.epsilon == 0:
            raise ValueError("epsilon is 0: use `method: {name: standard}` for training without an attack")
        if self.guard.action == "recover" and self.method.attacks and not self.method.one_step:
            raise ValueError(
                f"guard.action: recover goes on with n_fgsm, which is no substitute for {self.method.name}: use stop"
            )
        if self.norm != "linf" and (what := self.method.linf_alone):
            raise ValueError(f"norm is {self.norm}, but {what} is for the L-infinity ball alone: use norm: linf")
        if self.label_smoothing and getattr(getattr(self.method, "of", self.method), "label_smoothing", None) is not None:
            raise ValueError("label_smoothing: this method has a key of its own, method.label_smoothing: set that instead")
        if augment.mixup and augment.cutmix:
            raise ValueError("data.augment: mixup and cutmix exclude each other: set one of them to 0")
        if augment.mixes and not self.method.soft_labels:
            which = f"method {self.method.describe()} needs one label for each image"
            raise ValueError(f"data.augment.{augment.mixes}: {which}")
        if augment.flip == "alternate" and augment.crop == "random_resized":
            raise ValueError("data.augment.flip: alternate is for crop: none or pad; use true")
        if self.epsilon_warmup > self.epochs:
            raise ValueError(f"epsilon_warmup is {self.epsilon_warmup:g} epochs, but the phases last {self.epochs}")
        for section in (self.guard, self.selection):
            if section is not None and section.alpha is None:
                section.alpha = self.epsilon / 4
        if self.selection and not self.data.held_out:
            raise ValueError("selection needs training images that are set apart: set data.held_out, such as to 1000")
        if evaluation.epsilon is None:
            evaluation.epsilon = (self.epsilon,)
        if evaluation.alpha is None:
            evaluation.alpha = tuple(epsilon / 4 for epsilon in evaluation.epsilon)
        if len(evaluation.alpha) == 1:
            evaluation.alpha *= len(evaluation.epsilon)
        if len(evaluation.alpha) != len(evaluation.epsilon):
            counts = f"{len(evaluation.alpha)} values for the {len(evaluation.epsilon)} of evaluation.epsilon"
            raise ValueError(f"evaluation.alpha has {counts}: give one value, or one for each radius")
        fixed = datasets.facts(data.dataset, data.path)
        if fixed.channels is None and data.channels is None:
            data.channels = self._asked_channels()
        if fixed.channels is not None and data.channels not in (None, fixed.channels):
            raise ValueError(f"data.channels is {data.channels}, but {data.dataset} images have {fixed.channels}")
        if fixed.size is not None and data.labels:
            raise ValueError(f"data.labels is for folders of images; {data.dataset} has labels of its own")
        self._normalise()
        facts = self.facts
        channels, native = facts.channels, facts.size
        if channels is not None and (len(self.model.mean) != channels or len(self.model.std) != channels):
            raise ValueError(f"model.mean and model.std need {channels} value(s) for {data.dataset}")
        for i, phase in enumerate(self.phases):
            if phase.accumulate > 1 and not self.method.splits:
                raise ValueError(f"phases.{i}.accumulate: method {self.method.name} needs its whole batch at once")
            if native is None and phase.resolution is None:
                raise ValueError(f"phases.{i}.resolution is needed for {data.dataset}: the side of the training images")
            phase.resolution = phase.resolution or native
            phase.resize = phase.resize or (native or phase.resolution)
            if augment.crop == "pad" and augment.border == "reflect" and augment.padding >= phase.resolution:
                raise ValueError(
                    f"data.augment.padding: {augment.padding} pixels cannot be reflected in images of {phase.resolution}"
                )
            if native is not None and phase.resize != native:
                raise ValueError(f"phases.{i}.resize is {phase.resize}, but {data.dataset} images are {native} pixels wide")
            if augment.crop != "random_resized" and phase.resolution != phase.resize:
                raise ValueError(
                    f"phases.{i}: a resolution of {phase.resolution} out of images of {phase.resize} needs "
                    "data.augment.crop: random_resized"
                )
        if problem := self._too_far():
            raise ValueError(problem)
        self.schedule.check(self.epochs)
        return self

    def _too_far(self) -> str:
        """What is wrong with a radius in L2: no two images are further apart than the diagonal of the pixel box. Where the
        number of channels is not known yet, they may have 3."""
        side = max(phase.resolution for phase in self.phases)
        widest = math.sqrt((self.facts.channels or 3) * side * side)
        for key, radius in (("epsilon", self.epsilon), ("evaluation.epsilon", max(self.evaluation.epsilon))):
            if self.norm == "l2" and radius > widest:
                apart = f"no two images of {side} x {side} pixels are further apart than {widest:.4g} in L2"
                return f"{key} is {radius:g}, but {apart}; did you mean {radius:g}/255?"
        return ""

    def _asked_channels(self) -> int | None:
        """How many channels the model's section speaks of: torchvision's models take 3."""
        given = self.model.mean or self.model.std
        if given is not None:
            return 1 if len(given) == 1 else 3
        return None if self.model.name in parts.MODELS or re.match(r"timm/|.*:", self.model.name) else 3

    def _normalise(self) -> None:
        """The default mean and std, where it is known how many channels the images have."""
        if self.facts.channels is not None:
            self.model.mean = self.facts.mean if self.model.mean is None else self.model.mean
            self.model.std = self.facts.std if self.model.std is None else self.model.std

    def with_channels(self, channels: int) -> Config:
        """The config for images that turned out to have so many channels. Raises ConfigError."""
        changed = {"data": self.data.model_copy(update={"channels": channels}), "model": self.model.model_copy()}
        config = self.model_copy(update=changed)
        config._normalise()
        if problem := config._too_far():
            raise ConfigError(problem)
        return config

    @property
    def epochs(self) -> int:
        """Epochs as the paper counts them: for `free`, replays of a minibatch count as epochs."""
        return sum(phase.epochs for phase in self.phases)

    @property
    def replays(self) -> int:
        return self.method.updates_per_batch

    @property
    def facts(self) -> datasets.Dataset:
        """What is fixed about the data set; channels is None until a run has looked at its files."""
        return datasets.facts(self.data.dataset, self.data.path).of_channels(self.data.channels)

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

    def to_yaml(self, width: int = 120) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=width)
