"""What `benchmarks.methods` compares: the methods, what a step of each costs, and how long each is trained."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.paper import ROOT
from fastrobust.config import reading
from fastrobust.config.schema import Config

RUNS = Path("runs/methods")
FILES = {"full": "cifar10_methods.yaml", "small": "cifar10_methods_small.yaml"}  # the setting of each scale, with `fgsm`
METHODS = {  # name: the config's section; the most telling first
    "fgsm": "{name: fgsm}",
    "n_fgsm": "{name: n_fgsm}",
    "liet": "{name: liet}",
    "fgsm_uap": "{name: fgsm_uap}",
    "pgd_2": "{name: pgd, steps: 2, alpha: 4/255}",
    "fgsm_pgi": "{name: fgsm_pgi}",
    "free": "{name: free, replays: 4}",
    "sora": "{name: sora}",
    "rs_cs": "{name: rs_cs}",
    "class_uap": "{name: class_uap}",
    "n_aaer": "{name: n_aaer}",
    "standard": "{name: standard}",
    "pgd_7": "{name: pgd, steps: 7, alpha: 2/255}",
    "awp_fgsm": "{name: awp, of: {name: fgsm}}",
    "awp_n_fgsm": "{name: awp, of: {name: n_fgsm}}",
    "gradalign": "{name: gradalign}",
    "trades": "{name: trades}",
    "liet_stop": "{name: liet, stop_gradient: true}",
    "fgsm_pgi_stop": "{name: fgsm_pgi, stop_gradient: true}",
    "fgsm_uap_stop": "{name: fgsm_uap, stop_gradient: true, consistency: 1}",
}
REFERENCE = "fgsm"
SCHEDULES = ("equal epochs", "equal cost")
RULE = (
    "Equal epochs: all are trained as long as fgsm. Equal cost: a method whose step costs u forward passes is trained for "
    "fgsm's epochs times 5 / u, rounded to whole epochs, at least 1; the learning rate's schedule is stretched with it. An "
    "epoch of free is a replay, and its epochs are rounded to whole passes."
)
FORWARD = {  # forward passes of an update: a forward pass is 1, gradients of activations 1, of weights 1 (docs/methods.md)
    "standard": lambda m: 3,
    "fgsm": lambda m: 5,
    "n_fgsm": lambda m: 5,
    "sora": lambda m: 5,
    "n_aaer": lambda m: 5,
    "fgsm_uap": lambda m: 5 if m.stop_gradient else 7,
    "class_uap": lambda m: 5 if m.stop_gradient else 7,
    "fgsm_pgi": lambda m: 5 if m.stop_gradient else 7,
    "liet": lambda m: 5 if m.stop_gradient else 7,
    "rs_cs": lambda m: 7,
    "gradalign": lambda m: 11,
    "pgd": lambda m: 2 * m.steps + 3,
    "trades": lambda m: 2 * m.steps + 7,
    "free": lambda m: 3,
    "awp": lambda m: passes(m.of) + (6 if m.of.name == "trades" else 3),
}
OF_MACHINE = ("name", "output", "seed", "device", "engine", "loader", "logging")  # keys that do not belong to the setting
OF_DATA = ("path", "prepared", "workers", "download")


@dataclass(frozen=True)
class Job:
    """A method trained for so many epochs with a seed."""

    method: str
    epochs: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}_{self.epochs}epochs_seed{self.seed}"


def passes(method) -> int:
    """What an update of a method (a section of a config) costs, in forward passes."""
    return FORWARD[method.name](method)


def base(scale: str, method: str, changes: tuple[str, ...] = ()) -> Config:
    """The setting of a scale with this method. A method with label smoothing of its own keeps that."""
    return loaded(ROOT / "configs" / FILES[scale], (f"method={METHODS[method]}", *changes))


@cache
def loaded(file: Path, changes: tuple[str, ...]) -> Config:
    plain = reading.load(file, [*changes, "label_smoothing=0"])
    own = hasattr(getattr(plain.method, "of", plain.method), "label_smoothing")
    return plain if own else reading.load(file, list(changes))


def config_of(scale: str, job: Job, device: str = "auto", data: str | None = None) -> Config:
    changes = [f"phases.0.epochs={job.epochs}", f"seed={job.seed}", f"name={job.name}", f"output={RUNS / scale}"]
    changes += [f"device={device}"] + ([f"data.path={json.dumps(data)}"] if data else [])
    return base(scale, job.method, tuple(changes))


def epochs(scale: str, method: str, schedule: str) -> int:
    """How long a method is trained: see RULE."""
    usual, config = base(scale, REFERENCE), base(scale, method)
    wanted = float(usual.epochs)
    if schedule == "equal cost":
        wanted *= passes(usual.method) / passes(config.method)
    return max(1, round(wanted / config.replays)) * config.replays


def cost(method, epochs: int) -> float:
    """Of a training, in epochs of standard training. method: a section of a config."""
    return epochs * passes(method) / 3


def digest(config: Config) -> str:
    """Of all that a run was made with, but for its seed and what belongs to the machine: means are taken over runs of one
    digest. It changes with every new key, so it is computed and not stored. The evaluation's precision is left out: what
    breaks an image is decided in fp32 with any."""
    content = {key: value for key, value in config.to_dict().items() if key not in OF_MACHINE}
    content["data"] = {key: value for key, value in content["data"].items() if key not in OF_DATA}
    content["evaluation"] = {key: value for key, value in content["evaluation"].items() if key != "precision"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def digests(config: Config) -> set[str]:
    """Of the runs that the config makes: of each precision that `auto` may stand for."""
    chosen = ("fp32", "bf16", "fp16") if config.precision == "auto" else (config.precision,)
    return {digest(config.model_copy(update={"precision": precision})) for precision in chosen}
