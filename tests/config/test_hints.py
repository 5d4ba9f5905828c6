"""Tests of fastrobust.config.hints: suggestions only where they are what was meant."""

import pytest

from fastrobust.config.hints import did_you_mean, nearest

KNOWN = ("cifar10", "imagenet", "fgsm", "n_fgsm", "pgd", "model.std", "resnet18")


@pytest.mark.parametrize(
    ("word", "meant"),
    [("fgms", "fgsm"), ("imagnet", "imagenet"), ("cifar", "cifar10"), ("resnet-18", "resnet18"), ("PGD", "pgd")],
)
def test_typos(word, meant):
    assert nearest(word, KNOWN) == meant and did_you_mean(word, KNOWN) == f"; did you mean '{meant}'?"


@pytest.mark.parametrize("word", ["cifar100", "resnet50", "model.weights", "trades", "liet"])
def test_other_things_are_not_taken_for_typos(word):
    assert nearest(word, KNOWN) is None and did_you_mean(word, KNOWN, "; ask") == "; ask"
