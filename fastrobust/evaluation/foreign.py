"""Opening weights that another program trained, to be evaluated as a run's are."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import torch

from fastrobust.attack.verdicts import classified
from fastrobust.config import datasets, reading
from fastrobust.config.schema import Config
from fastrobust.data import loaders, sets
from fastrobust.evaluation.from_python import check_model
from fastrobust.evaluation.trained import Trained
from fastrobust.models import create, foreign
from fastrobust.models.weights import weights_digest
from fastrobust.runtime.errors import ConfigError

PHOTOS = 224  # the side of photographs, unless another is asked for
TRIAL = 500  # test images that choose the normalisation
LISTED = 10  # classes in a message
MNISTS = ((0.1307,), (0.3081,))
IMAGENETS = (datasets.DATASETS["imagenet"].mean, datasets.DATASETS["imagenet"].std)


def open_foreign(
    path: str | Path,
    model: str,
    dataset: str,
    *,
    epsilon: float,
    norm: str = "linf",
    data: str | None = None,
    resolution: int | None = None,
    constants: tuple[list[float], list[float]] | None = None,
    device: torch.device | str = "cpu",
) -> Trained:
    """Open a file of weights for the model of this name and the test set of this data set. constants: mean and standard
    deviation of the model's normalisation, for pixels in [0, 1]. Without them that of the file is taken; of a file without
    one, that of some usual ones with which the model classifies most of 500 test images correctly: all are printed. Raises
    RunError, ConfigError or DataError."""
    tensors, section = foreign.read(path)
    config = config_of(path, model, dataset, epsilon, norm, data, resolution)
    classes = config.facts.classes or sets.list_images(dataset, "test", config.data.path).classes
    channels = config.facts.channels
    given = constants and [per_channel(values, channels) for values in constants]
    about = {"channels": channels, "classes": len(classes)}
    network = create(model, **about, mean=(0.0,) * channels, std=(1.0,) * channels)
    found = foreign.fit(network, tensors, f"the weights in {path}")
    foreign.assign(network, found)
    network = network.to(device, memory_format=torch.channels_last).eval()
    print(f"weights: {len(found.tensors)} tensors of {path}" + (f", its section {section}" if section else ""), flush=True)
    test = loaders.test_set(config, TRIAL)
    check_model(network, test.images[:1])
    share = None
    if given:
        normalize(network, *given)
    elif found.mean is not None and found.std is not None:
        normalize(network, found.mean, found.std)
        print(f"normalisation: the file's, {in_words(found.mean, found.std)}")
    else:
        share = best_normalisation(network, config, test)
    warn_of_chance(accuracy(network, test) if share is None else share, test, dataset)
    config.model.mean, config.model.std = (tuple(t.flatten().tolist()) for t in (network.mean, network.std))
    return Trained(network, config, classes, Path(path), weights_digest(network))


def config_of(
    path: str | Path, model: str, dataset: str, epsilon: float, norm: str, data: str | None, resolution: int | None
) -> Config:
    """The config of a run that would have left these weights, as far as an evaluation asks for it."""
    facts = datasets.facts(dataset, data)
    if facts.size and resolution not in (None, facts.size):
        raise ConfigError(f"--resolution is for photographs: the images of {dataset} are {facts.size} x {facts.size} pixels")
    size = facts.size or resolution or PHOTOS
    config = reading.parse(
        {
            "name": re.sub(r"[^A-Za-z0-9._-]|^\W", "_", Path(path).stem)[:100] or "weights",
            "norm": norm,
            "epsilon": epsilon,
            "data": {"dataset": dataset, "path": data, "channels": facts.channels or 3},
            "model": {"name": model, "weights": str(path)},
            "method": {"name": "standard"},
            "optimizer": {"name": "sgd"},
            "schedule": {"name": "cyclic", "max_lr": 1.0},
            "phases": [{"epochs": 1, "batch_size": 1, "resolution": size}],
        },
        str(path),
    )
    return loaders.from_source(config, data or (None if config.facts.read else str(sets.locate(dataset))))


def per_channel(values: list[float], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise ConfigError(
            f"--mean and --std need one number, or one for each of {channels} channels; there are {len(values)}"
        )
    return tuple(values) * (channels // len(values))


def normalize(network, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with torch.no_grad():
        network.mean.copy_(torch.tensor(mean)[:, None, None])
        network.std.copy_(torch.tensor(std)[:, None, None])


def best_normalisation(network, config: Config, test: sets.ImageSet) -> float:
    """Give the model the normalisation with which it is right most often on the images, and return on which share of them;
    prints what was tried."""
    facts = config.facts
    none = (0.0,) * facts.channels, (1.0,) * facts.channels
    halves, whole = ((0.5,) * facts.channels,) * 2, ((0.0,) * facts.channels, (1 / 255,) * facts.channels)
    usual = {IMAGENETS: "ImageNet's"} if facts.channels == 3 else {MNISTS: "0.1307 and 0.3081"}
    tried = {(facts.mean, facts.std): f"{config.data.dataset}'s"} | usual | {halves: "0.5 and 0.5", none: "none"}
    tried |= {whole: "pixels of 0 to 255"}
    right = {}
    for constants in tried:
        normalize(network, *constants)
        right[constants] = accuracy(network, test)
    best = max(right, key=right.get)
    normalize(network, *best)
    shown = ", ".join(f"{tried[c]} {share:.1%}" for c, share in sorted(right.items(), key=lambda item: -item[1]))
    print(f"normalisation: {tried[best]} (clean accuracy on {len(test.labels)} images: {shown})", flush=True)
    return right[best]


def accuracy(network, test: sets.ImageSet) -> float:
    device = next(network.parameters()).device
    return classified(network, test.images.to(device), test.labels.to(device), 100).double().mean().item()


def warn_of_chance(share: float, test: sets.ImageSet, dataset: str) -> None:
    """Say so where a model that always names the largest class could be right on this share of the images."""
    n = len(test.labels)
    chance = test.labels.bincount().max().item() / n
    if share > chance + 3 * math.sqrt(chance * (1 - chance) / n):
        return
    some = [*test.classes[:LISTED], "…", test.classes[-1]] if len(test.classes) > LISTED + 1 else test.classes
    print(
        f"warning: clean accuracy is {share:.1%} on {n} test images, no better than guessing ({chance:.1%}): the weights, "
        f"the model, the normalisation or the order of the classes does not fit. The logits must be in the order of "
        f"{dataset}'s {len(test.classes)} classes: {', '.join(some)}",
        file=sys.stderr,
        flush=True,
    )


def in_words(mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    return " and ".join("(" + ", ".join(f"{v:.4g}" for v in values) + ")" for values in (mean, std))
