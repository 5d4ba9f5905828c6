"""Held-out selection: after an epoch PGD attacks training images that are set apart (`data.held_out`), and the run ends
with the weights that stood it best: those of some epoch, as they were trained or averaged. Test images are never asked."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrobust.config.schema import Config
from fastrobust.data import loaders
from fastrobust.runtime.distributed import World
from fastrobust.runtime.errors import ConfigError
from fastrobust.train import guard


class HeldOut(NamedTuple):
    """images: uint8 N x C x H x W at the resolution of the last phase; labels: int64 N; both on the training device.
    checksum: of both, as an evaluation gives it."""

    images: Tensor
    labels: Tensor
    checksum: str


def held_out(config: Config, classes: tuple[str, ...], device: torch.device, world: World) -> HeldOut:
    """The images that weights are chosen on. Raises ConfigError where those are the test images; DataError."""
    if loaders.test_split(config) == "held_out":
        raise ConfigError(
            "selection: the held-out images are this run's test images, and weights are not chosen on those. Give test "
            "images of their own (a folder `test` or `val` beside `train`), or leave selection out"
        )
    with world.one_after_the_other(config.data.download):
        found = loaders.still(config, "held_out", None).labelled_as(classes, config.name)
    images = found.images.to(device).contiguous(memory_format=torch.channels_last)
    return HeldOut(images, found.labels.to(device), found.checksum())


def look(training, record: dict[str, Any]) -> str:
    """Attack the held-out images, with the averaged weights and with the trained ones. Their accuracies go into the record;
    weights that are better than all before are kept in `training.best`, and `training.selected` says which they are. The
    radius and the random starts are the same after every epoch. Returns a line that says what was found."""
    config, learner, world = training.config, training.learner, training.world
    (images, labels, _), settings = training.held_out, config.selection
    before, told = training.selected, []
    for kind in ("live",) if learner.average is None else ("live", "averaged"):
        if kind == "averaged":
            learner.average.swap()
        threat, alpha, seed = training.step.threat, settings.alpha, config.seed
        found = guard.look(learner.model, images, labels, threat, alpha, settings.steps, seed, world)
        robust, clean = (verdicts.double().mean().item() for verdicts in (found.robust, found.clean))
        name = "held_out" if kind == "live" else "averaged_held_out"
        record |= {f"{name}_accuracy": robust, f"{name}_clean_accuracy": clean}
        told.append(f"{'' if kind == 'live' else 'averaged '}PGD {robust:.1%}")
        best, accuracies = training.selected, {"robust_accuracy": robust, "clean_accuracy": clean}
        if best is None or (robust, clean) > (best["robust_accuracy"], best["clean_accuracy"]):
            training.selected = {"epoch": record["epoch"], "weights": kind} | accuracies
            training.best = {key: t.detach().clone() for key, t in learner.model.state_dict().items()}
        if kind == "averaged":
            learner.average.swap()
    now = training.selected
    best = "the best so far" if now is not before else f"best: {now['robust_accuracy']:.1%}, epoch {now['epoch']}"
    return f"{'held out':>13}  {'  '.join(told)}  ({best}{', averaged' if now['weights'] == 'averaged' else ''})"


def facts(training) -> dict[str, Any]:
    """For `summary.json`: which weights the run ends with, and how they were chosen."""
    config, held = training.config, training.held_out
    attack = {"attack": f"pgd-{config.selection.steps}-1", "epsilon": config.epsilon, "alpha": config.selection.alpha}
    return training.selected | attack | {"images": len(held.labels), "held_out_images": held.checksum}


def in_words(found: dict[str, Any]) -> str:
    kind = "averaged weights" if found["weights"] == "averaged" else "weights"
    accuracy = f"{found['robust_accuracy']:.2%} under {found['attack']}"
    return f"selected: the {kind} after epoch {found['epoch']}, {accuracy} on {found['images']:,} held-out images"
