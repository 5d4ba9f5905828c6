"""The schema of a run: strict, typed, and written as people write it (`epsilon: 8/255`).

A `Config` has every default filled in, so that what is stored with a run says everything that the run did. Pixels are
in [0, 1]: epsilon and alpha are fractions of that range.
"""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def parse_number(value: Any) -> Any:
    """`8/255`, `5e-3` (a string in YAML 1.1) and plain numbers -> float; anything else is left for the schema to refuse."""
    if isinstance(value, str):
        try:
            return float(Fraction(value.replace(" ", ""))) if "/" in value else float(value)
        except (ValueError, ZeroDivisionError, OverflowError):
            raise ValueError(f"'{value}' is not a number; write 0.03 or 8/255") from None
    if isinstance(value, bool):
        raise ValueError("expected a number, got true/false")
    return value


def _pixels(value: float) -> float:
    if value > 1:
        raise ValueError(f"{value:g} is larger than the pixel range [0, 1]; did you mean {value:g}/255?")
    return value


def _mean(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(not 0 <= v <= 1 for v in values):
        raise ValueError("must lie in [0, 1]: pixels are divided by 255")
    return values


def _some(values: tuple) -> tuple:
    if not values:
        raise ValueError("at least one value is needed")
    return values


def _std(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(v <= 0 for v in values):
        raise ValueError("must be positive")
    return values


Number = Annotated[float, BeforeValidator(parse_number), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Pixels = Annotated[Number, Field(ge=0), AfterValidator(_pixels)]
Count = Annotated[int, Field(ge=1, le=10**9, strict=True)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class Augment(Section):
    """Applied on the training device, batch by batch. `pad` is the random crop with zero padding of the CIFAR-10 recipe."""

    crop: Literal["none", "pad", "random_resized"] = "none"
    padding: Count = 4
    flip: bool = False


class Data(Section):
    dataset: Literal["mnist", "fashion_mnist", "cifar10", "imagenet", "imagenette", "image_folder"]
    path: str | None = None
    prepared: str | None = None  # folder of data_prep's files; default: DATASET-ffcv or DATASET-dali beside the data sets
    workers: Count | None = None  # threads or processes that decode; default: one for each core
    download: bool = False
    limit: Count | None = None
    augment: Augment = Augment()


class Model(Section):
    """`mean` and `std` are in units of pixels in [0, 1]; the normalisation they describe is the model's first layer."""

    name: str
    mean: Annotated[tuple[Number, ...], AfterValidator(_mean)] | None = None
    std: Annotated[tuple[Number, ...], AfterValidator(_std)] | None = None


class Standard(Section):
    name: Literal["standard"]


class Attacked(Section):
    """`attack_batchnorm`: `train` (the authors' code) lets the attack pass use batch statistics and move the running
    averages; `eval` makes it use the running averages and leave them alone."""

    attack_batchnorm: Literal["train", "eval"] = "train"


class Fgsm(Attacked):
    name: Literal["fgsm"]
    init: Literal["zero", "random", "previous"] = "random"
    alpha: Pixels | None = None  # default 1.25 epsilon
    clip_start: bool = True  # cut random starts with the pixel box: the authors' CIFAR-10 code does, their MNIST code not
    ibp_weight: Annotated[Number, Field(ge=0, le=1)] = 0.0  # share of the loss that is its interval bound within epsilon


class NFgsm(Attacked):
    name: Literal["n_fgsm"]
    noise: Positive = 2.0  # the start is U(-noise * epsilon, noise * epsilon)
    alpha: Pixels | None = None  # default epsilon


class Pgd(Attacked):
    name: Literal["pgd"]
    steps: Count = 7
    alpha: Pixels
    init: Literal["zero", "random"] = "random"
    skip_misclassified: bool = False  # true in the authors' MNIST code: such examples stay where they are


class Free(Section):
    name: Literal["free"]
    replays: Count = 8


class Sgd(Section):
    name: Literal["sgd"]
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 5e-4
    decay_batchnorm: bool = True


class Adam(Section):
    name: Literal["adam"]
    weight_decay: NonNegative = 0.0
    decay_batchnorm: bool = True


class Cyclic(Section):
    """0 -> max_lr at `peak` (a fraction of training) -> 0, linear in between (paper, section 5.2: 2/5)."""

    name: Literal["cyclic"]
    max_lr: Positive
    peak: Annotated[Number, Field(gt=0, lt=1)] = 0.4


class Multistep(Section):
    """`lr`, multiplied by `factor` at each milestone (fractions of training)."""

    name: Literal["multistep"]
    lr: Positive
    milestones: tuple[Annotated[Number, Field(gt=0, lt=1)], ...] = (0.5, 0.75)
    factor: Positive = 0.1


class Points(Section):
    """Linear interpolation between (epoch, learning rate) pairs."""

    name: Literal["points"]
    points: Annotated[tuple[tuple[NonNegative, NonNegative], ...], AfterValidator(_some)]

    @model_validator(mode="after")
    def _sorted(self):
        epochs = [epoch for epoch, _ in self.points]
        if epochs != sorted(epochs):
            raise ValueError("the epochs of the points must not decrease")
        return self


class Phase(Section):
    """`resolution` is the side of the images that the model sees; `resize` the short side of those they are cropped from."""

    epochs: Count
    batch_size: Count
    resolution: Count | None = None
    resize: Count | Literal["original"] | None = None


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML 1.1 reads `off` as false


class Guard(Section):
    """PGD on one training minibatch after each epoch (paper, appendix B): a fall of robust accuracy by more than `drop`
    from one epoch to the next is catastrophic overfitting. alpha defaults to epsilon / 4 (2/255 at epsilon 8/255)."""

    action: Annotated[Literal["stop", "warn", "off"], BeforeValidator(_off)] = "stop"
    steps: Count = 5
    alpha: Pixels | None = None
    drop: Annotated[Number, Field(gt=0, lt=1)] = 0.2


class Evaluation(Section):
    """PGD on the test set. epsilon defaults to the training epsilon; alpha to epsilon / 4."""

    epsilon: Annotated[tuple[Pixels, ...], AfterValidator(_some)] | None = None
    alpha: Pixels | None = None
    steps: Count = 50
    restarts: Count = 10
    batch_size: Count = 500
    limit: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_epsilon(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("epsilon"), (int, float, str)):
            return {**data, "epsilon": [data["epsilon"]]}
        return data


class Config(Section):
    name: Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    output: str = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**31, strict=True)] = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    engine: Literal["auto", "eager", "compile", "cuda_graph", "compile+cuda_graph"] = "auto"
    loader: Literal["auto", "resident", "ffcv", "dali", "torch"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    deterministic: bool = False  # the same bits every time on a GPU too, at some cost; a CPU gives them anyway
    epsilon: Pixels
    epsilon_warmup: NonNegative = 0.0  # epochs over which epsilon and alpha grow linearly from 0
    data: Data
    model: Model
    method: Annotated[Standard | Fgsm | NFgsm | Pgd | Free, Field(discriminator="name")]
    optimizer: Annotated[Sgd | Adam, Field(discriminator="name")]
    schedule: Annotated[Cyclic | Multistep | Points, Field(discriminator="name")]
    phases: Annotated[tuple[Phase, ...], AfterValidator(_some)]
    guard: Guard = Guard()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _fill_in(self):
        """Resolve every default that depends on another key, and refuse what cannot be meant."""
        method, data, augment = self.method, self.data, self.data.augment
        if method.name == "fgsm" and method.alpha is None:
            method.alpha = 1.25 * self.epsilon
        if method.name == "n_fgsm" and method.alpha is None:
            method.alpha = self.epsilon
        if method.name != "standard" and self.epsilon == 0:
            raise ValueError("epsilon is 0: use `method: {name: standard}` for training without an attack")
        if self.epsilon_warmup > self.epochs:
            raise ValueError(f"epsilon_warmup is {self.epsilon_warmup:g} epochs, but the phases last {self.epochs}")
        if self.guard.alpha is None:
            self.guard.alpha = self.epsilon / 4
        if self.evaluation.epsilon is None:
            self.evaluation.epsilon = (self.epsilon,)
        mean, std = NORMALISATION[data.dataset]
        self.model.mean = mean if self.model.mean is None else self.model.mean
        self.model.std = std if self.model.std is None else self.model.std
        channels = CHANNELS[data.dataset]
        if len(self.model.mean) != channels or len(self.model.std) != channels:
            raise ValueError(f"model.mean and model.std need {channels} value(s) for {data.dataset}")
        for i, phase in enumerate(self.phases):
            native = RESOLUTION[data.dataset]
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
        if self.schedule.name == "points" and self.schedule.points[-1][0] < self.epochs:
            last = self.schedule.points[-1][0]
            raise ValueError(f"schedule.points end at epoch {last:g}, but the phases last {self.epochs} epochs")
        return self

    @property
    def epochs(self) -> int:
        """Epochs as the paper counts them: for `free`, replays of a minibatch count as epochs."""
        return sum(phase.epochs for phase in self.phases)

    @property
    def replays(self) -> int:
        return self.method.replays if self.method.name == "free" else 1

    def passes(self, phase: Phase) -> int:
        """Passes over the data in a phase: its epochs, divided by the replays of `free` and rounded up."""
        return math.ceil(phase.epochs / self.replays)

    def to_dict(self) -> dict[str, Any]:
        return json.loads(self.model_dump_json())

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=120)


CHANNELS = {"mnist": 1, "fashion_mnist": 1, "cifar10": 3, "imagenet": 3, "imagenette": 3, "image_folder": 3}
RESOLUTION = {"mnist": 28, "fashion_mnist": 28, "cifar10": 32, "imagenet": None, "imagenette": None, "image_folder": None}
NORMALISATION = {  # the authors train MNIST on raw pixels
    "mnist": ((0.0,), (1.0,)),
    "fashion_mnist": ((0.0,), (1.0,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
} | dict.fromkeys(["imagenet", "imagenette", "image_folder"], ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
