"""The schema of a run: strict, typed, and written as people write it (`epsilon: 8/255`).

A `Config` has every default filled in, so that what is stored with a run says everything that the run did. Pixels are
in [0, 1]: epsilon and alpha are fractions of that range.
"""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, model_validator

from fastrobust.config import datasets, parts
from fastrobust.config.fields import FolderName, NonNegative, Number, Pixels, Positive, Section, Seed, key, some
from fastrobust.config.numbers import ball_in_words
from fastrobust.config.sections import (
    Averaging,
    Data,
    Evaluation,
    Guard,
    Model,
    Phase,
    Place,
    Selection,
    named,
    word,
)
from fastrobust.runtime.errors import ConfigError


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError(f"'{value}' is none of auto, cpu, cuda and cuda:NUMBER")
    return value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Config(Section):
    name: FolderName = key("name of the run directory", ..., "the file's name without `.yaml`")
    output: Place = key("where run directories are made: the run goes to `OUTPUT/NAME/`", "runs")
    seed: Seed = key("seed of the weights, the order of the images and the random starts", 0)
    device: Annotated[str, AfterValidator(_device)] = key(
        "`auto` is the GPU if there is one, else the CPU", "auto", values="`auto`, `cpu`, `cuda`, `cuda:N`"
    )
    engine: Literal[
        "auto", "eager", "compile", "cuda_graph", "compile+cuda_graph", "fused", "fused+cuda_graph", "numba", "winograd"
    ] = key(
        "how a step is run. `auto` is `cuda_graph` on a GPU, and `eager` on a CPU with two exceptions: in bf16 with AMX it "
        "is `numba`; in fp32 it is `winograd` where a trial of a few steps finds that 1.15 times as fast (no trial with "
        "`deterministic: true`). If compiling or capturing fails, a warning says so and training goes on eagerly. `fused`, "
        "`numba`, `winograd`: see below",
        "auto",
    )
    loader: word(("auto", *parts.LOADERS), "package.module:Class") = key(
        "what reads the training images: see [data.md](data.md#loaders)", "auto"
    )
    logging: Annotated[tuple[word(parts.LOGGERS, "package.module:Class"), ...], BeforeValidator(_listed)] = key(
        "where the figures of each epoch go, besides `metrics.jsonl`: see [reliability.md](reliability.md#logging)",
        ("tensorboard",),
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = key(
        "of the forward and backward passes. `auto` is half precision on a GPU (`bf16` where it has that). On a CPU with "
        "bf16 instructions it is what a trial of a few steps finds faster, by 1.15 times at least (networks of less than "
        "10 MFLOP an image are left out); else, and with `deterministic: true`, `fp32`. `fp16` uses a dynamic loss scale, "
        "for the attack too. Weights are fp32 always. On a GPU `fp32` lets convolutions round their inputs to TF32 (10 "
        "bits), as PyTorch does; `summary.json` says so (`arithmetic`)",
        "auto",
    )
    deterministic: bool = key(
        "`true`: the same bits every time on a GPU too, but slower. A CPU gives the same bits with the same number of "
        "threads, which `true` keeps fixed",
        False,
    )
    norm: Literal["linf", "l2"] = key("norm of the ball, of every radius and of every step size", "linf")
    epsilon: Pixels = key("radius of the ball that training uses")
    epsilon_warmup: NonNegative = key("epsilon and alpha grow linearly from 0 over so many epochs", 0.0, values="epochs")
    data: Data
    model: Model
    method: named("method") = key("the training method")
    optimizer: named("optimizer") = key("the optimiser")
    loss: Literal["cross_entropy", "boosted"] = key(
        "the loss of attack and update. `boosted` (MART's): cross-entropy plus -log(1 - p), p being the largest probability "
        "of a class that is not the label. A method with a loss of its own refuses it",
        "cross_entropy",
    )
    label_smoothing: Number = key(
        "share of each label that is spread over all classes, in the losses of attack and update", 0.0, ge=0, lt=1
    )
    clip_gradients: Positive | None = key("the largest norm of all weight gradients together", None, "none")
    averaging: Averaging | None = None
    schedule: named("schedule") = key("the learning-rate schedule")
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
        if getattr(getattr(self.method, "of", self.method), "label_smoothing", None) is not None:
            if self.label_smoothing:
                raise ValueError(
                    "label_smoothing: this method has a key of its own, method.label_smoothing: set that instead"
                )
            if self.loss != "cross_entropy":
                raise ValueError(f"loss is {self.loss}, but this method has a loss of its own: use loss: cross_entropy")
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
        for name, radius in (("epsilon", self.epsilon), ("evaluation.epsilon", max(self.evaluation.epsilon))):
            if self.norm == "l2" and radius > widest:
                apart = f"no two images of {side} x {side} pixels are further apart than {widest:.4g} in L2"
                return f"{name} is {radius:g}, but {apart}; did you mean {radius:g}/255?"
        return ""

    def _asked_channels(self) -> int | None:
        """How many channels the model's section speaks of: torchvision's models take 3."""
        given = self.model.mean or self.model.std
        if given is not None:
            return 1 if len(given) == 1 else 3
        return None if self.model.name in parts.MODELS or re.match(r"timm/|given/|.*:", self.model.name) else 3

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
