"""Attacks on a few images of bars, with AutoAttack at a small budget."""

from __future__ import annotations

import torch
from conftest import bar_images

from fastrobust.attack import autoattack
from fastrobust.data.sets import ImageSet
from fastrobust.evaluation import accuracy
from fastrobust.evaluation.accuracy import run_attacks

EPSILON = 0.1


def few_images() -> ImageSet:
    """60 fresh images of bars; every ninth label is wrong."""
    images, labels = map(torch.from_numpy, bar_images(60, 99))
    labels[::9] = (labels[::9] + 1) % 10
    return ImageSet(images.permute(0, 3, 1, 2), labels, tuple("0123456789"), "")


def run(model, data, names, **changes):
    settings = {"epsilon": EPSILON, "alpha": EPSILON / 4, "batch_size": 16, "seed": 0}
    return run_attacks(model, data, names, **(settings | changes))


def cheaper(attack):
    """A smaller budget, the same for both sides of a comparison."""
    for name, value in {"n_target_classes": 2, "n_queries": 80, "n_restarts": 1}.items():
        if hasattr(attack, name):
            setattr(attack, name, value)
    attack.n_iter = min(20, getattr(attack, "n_iter", 0))


def make_cheap(monkeypatch) -> None:
    """The parts of AutoAttack that evaluations build have a smaller budget from here on."""
    build = accuracy.build

    def cheaply(*arguments):
        attack = build(*arguments)
        if isinstance(attack, autoattack.Part):
            cheaper(attack.attack)
        return attack

    monkeypatch.setattr(accuracy, "build", cheaply)
