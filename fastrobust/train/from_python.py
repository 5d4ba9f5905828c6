"""`fastrobust.fit`: a run without a config file, for a program's own network and images."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastrobust.config import parts, reading
from fastrobust.config.datasets import DATASETS, FROM_FILES
from fastrobust.config.fields import folder_name
from fastrobust.config.numbers import ball_in_words
from fastrobust.config.places import expand
from fastrobust.data import arrays, given, loaders
from fastrobust.evaluation import results
from fastrobust.evaluation.answers import alike, answers
from fastrobust.evaluation.from_python import number
from fastrobust.models import GIVEN
from fastrobust.models.given import check_module, check_tensors
from fastrobust.models.weights import read_weights, weights_digest
from fastrobust.runtime import distributed, interrupt, run_directory
from fastrobust.runtime.errors import ConfigError, DataError, RunError
from fastrobust.runtime.files import explained
from fastrobust.train import start

IMAGES = "images.npz"  # in the run directory: the images that the program gave
TESTED = 1000  # test images that the evaluation at the end attacks, unless the config says otherwise


@dataclass(frozen=True)
class Run:
    """A finished run. directory: its files. model: trained, in eval mode, normalisation inside: images in [0, 1] -> logits.
    classes: names in the order of the logits. summary: what `summary.json` holds. history: a dict for each epoch."""

    directory: Path
    model: nn.Module
    classes: tuple[str, ...]
    summary: dict[str, Any]
    history: list[dict[str, Any]]

    def __repr__(self) -> str:
        s = self.summary
        clean, robust = f"{s['clean_accuracy']:.1%} clean", f"{s['robust_accuracy']:.1%} under {s['attack']}"
        ball = ball_in_words(s["epsilon"], s.get("norm", "linf"))
        return f"Run({self.directory}: {clean}, {robust} at {ball}, {s['examples']} test images)"


@torch.inference_mode(False)
@torch.enable_grad()
def fit(
    model: nn.Module | str,
    data: Any,
    *,
    epsilon: float,
    test: Any = None,
    method: str | dict[str, Any] = "fgsm",
    epochs: int = 15,
    batch_size: int = 128,
    lr: float = 0.1,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    resolution: int | None = None,
    name: str | None = None,
    output: str | Path = "runs",
    resume: bool = False,
    config: dict[str, Any] | None = None,
) -> Run:
    """Train a robust classifier, evaluate it, and return it with what its run directory holds.

    model: a network that takes N x C x H x W and gives logits, which is trained in place; or a name as in a config.
    data: (images, labels), a Dataset with a length, a folder of images, a `.npz` file, or a data set's name such as
    "cifar10". Images are uint8, or floats in [0, 1]. test: the same for the test images, where `data` holds none.
    epsilon: radius in pixels of [0, 1]. method: a name, or a dict of the config's section. lr: the highest learning rate of
    SGD with the cyclic schedule. mean, std: normalisation by a first layer before the network, a number or one for each
    channel; default: none for a network, the data set's for a name. classes: their names, in the order of the logits.
    resolution: side in pixels, for folders. name, output: the run goes to OUTPUT/NAME. resume: go on with the run that is
    there. config: other keys, such as {"norm": "l2", "phases.0.epochs": 5}, or sections, such as {"data": {"augment":
    {"flip": True}}}; see docs/configuration.md. Images that are given go into the run directory, so that it can be
    evaluated later.

    Installs no signal handlers and leaves the random generators as they were. Raises FastrobustError."""
    if isinstance(classes, str) or (classes is not None and len(set(classes)) != len(classes)):
        raise DataError(f"classes must be names, each once; they are {classes!r}")
    network = None if isinstance(model, str) else model
    if network is not None:
        check_module(network, ", or the name of a model")
        check_tensors(network)
    title = model.rpartition("/")[2].replace(":", "_") if isinstance(model, str) else type(model).__name__
    kind = method if isinstance(method, str) else str(method.get("name"))
    try:
        name = folder_name(str(name or f"{title}_{kind.rpartition(':')[2]}".lower()))
    except ValueError as error:
        raise ConfigError(f"name: {error}; give name=") from None
    if not isinstance(config, dict | None):
        raise ConfigError(f"config must be a dict of keys and values, such as {{'seed': 1}}; it is {config!r}")
    for key in {"name", "output", "epsilon"} & set(config or {}):
        raise ConfigError(f"config: {key} is an argument of fit: give {key}=")
    directory = Path(expand(output)) / name
    if (directory / run_directory.CONFIG).exists() and not resume:
        raise RunError(f"{directory} holds a run already: give another name=, or resume=True to go on with it")
    settings: dict[str, Any] = {
        "name": name,
        "output": str(directory.parent),
        "epsilon": number("epsilon", epsilon),
        "model": {
            "name": model if isinstance(model, str) else GIVEN + f"{type(model).__module__}.{type(model).__qualname__}"
        },
        "method": {"name": method} if isinstance(method, str) else dict(method),
        "optimizer": {"name": "sgd"},
        "schedule": {"name": "cyclic", "max_lr": lr},
        "phases": [{"epochs": epochs, "batch_size": batch_size}],
        "evaluation": {"limit": TESTED},
    }
    if resolution is not None:
        settings["phases"][0]["resolution"] = resolution
    with _placed(data, test, classes, directory) as (dataset, path):
        settings["data"] = {"dataset": dataset} | ({"path": path} if path else {})
        pixels = {key: value for key, value in (("mean", mean), ("std", std)) if value is not None}
        each = {key: number(key, value) for key, value in pixels.items() if np.ndim(value) == 0}
        settings["model"] |= {key: [number(key, one) for one in value] for key, value in pixels.items() if key not in each}
        for key, value in (config or {}).items():
            reading.merge(settings, str(key), value, f"config[{key!r}]")
        parsed = reading.parse(settings, "fit")
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with interrupt.left_alone(), torch.random.fork_rng(devices), distributed.joined(parsed.device) as (world, device):
            each = ({} if network is None else {"mean": 0.0, "std": 1.0}) | each  # a network has none unless one is given
            if each:
                facts = parsed.facts
                if facts.channels is None:
                    facts = world.first(lambda: loaders.resolve(parsed, device)).facts
                settings["model"] = {key: [value] * facts.channels for key, value in each.items()} | settings["model"]
                parsed = reading.parse(settings, "fit")
            summary = start.run(parsed, directory, device, world, again=resume, network=network)
    trained, _, names = read_weights(directory, network)
    trained = trained.to(memory_format=torch.contiguous_format)
    check_code(trained, directory, parsed.facts.channels)
    history = [json.loads(line) for line in (directory / run_directory.METRICS).read_text().splitlines()]
    return Run(directory, trained, names, summary, history)


def check_code(trained: nn.Module, directory: Path, channels: int) -> None:
    """Raise RunError where a run's kept evaluation of these weights is of other code of the network."""
    for record in results.read_all(directory / results.FOLDER):
        side = record.settings["resolution"]
        same = record.settings["weights"] == weights_digest(trained)
        if same and not alike(record.facts.get("answers"), answers(trained, (channels, side, side))):
            raise RunError(f"{directory} was trained with other code of the network: give that, or another name=")


@contextlib.contextmanager
def _placed(data: Any, test: Any, classes: Sequence[str] | None, directory: Path):
    """Gives (data set, path) as a config says them. Images that a program gave are written into the run directory, or, where
    they are there already, compared with those; if no run comes of it they are removed again. Raises DataError."""
    if isinstance(data, str | os.PathLike):
        if test is not None:
            raise DataError("test= belongs to images given from Python: a folder or data set has its own test images")
        name, path = str(data), Path(expand(data))
        if name in {*DATASETS, *FROM_FILES} or (":" in name and not path.exists()):
            yield name, None
        elif not path.exists():
            known = parts.unknown(name, (*DATASETS, *FROM_FILES))
            raise DataError(f"data: there is no folder or file {path}, and no data set: {known}")
        else:
            yield ("arrays" if path.suffix == ".npz" else "image_folder"), str(path.absolute())
        return
    if test is None:
        raise DataError("give test=(images, labels) too: robustness is measured on images that were not trained on")
    train = given.read(data) if classes is None else given.read_for(tuple(map(str, classes)), data, "the model")
    if classes is None and given.names_of(data) is None and train.labels.min() > 0:
        raise DataError(given.FROM_ONE)
    held = given.read_for(train.classes, test, "the model")
    forms = [" x ".join(map(str, found.images.shape[1:])) for found in (train, held)]
    if forms[0] != forms[1]:
        told = f"the training images are {forms[0]} and the test images {forms[1]}"
        raise DataError(f"{told} (height, width, channels): give them one form")
    file = directory / IMAGES
    if file.exists():
        for split, mine in (("train", train), ("test", held)):
            stored = arrays.read(split, str(file))
            if not all(np.array_equal(a, b) for a, b in zip(stored, (mine.images, mine.labels), strict=True)):
                raise DataError(f"{directory} was begun with other {split} images: give another name=")
    else:
        with explained(f"{directory} cannot be made"):
            directory.mkdir(parents=True, exist_ok=True)
        splits = {"train": (train.images, train.labels), "test": (held.images, held.labels)}
        arrays.write(file, splits, train.classes)
    try:
        yield "arrays", str(file.absolute())
    finally:
        if not (directory / run_directory.CONFIG).exists():
            file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                directory.rmdir()
