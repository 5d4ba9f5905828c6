"""Which images a limit leaves: every class has its share of the test images, by one rule for all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_files import fashion_mnist
from training_runs import CPU

from fastrobust.data import loaders
from fastrobust.data.held_out import SPREAD, evenly_spaced, spread
from fastrobust.data.sets import load
from fastrobust.evaluation.trained import Trained
from fastrobust.models.weights import build_model
from fastrobust.train import start

NAMES = tuple("abcdefghij")


def counts(labels) -> list[int]:
    return np.bincount(labels, minlength=10).tolist()


@pytest.mark.parametrize("limit", [1, 7, 10, 100, 999, 1000, 5000])
def test_a_shuffled_balanced_set_stays_balanced(limit):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 500))
    found = spread(labels, NAMES, limit)
    assert len(set(found.tolist())) == limit and (np.diff(found) > 0).all()
    assert max(counts(labels[found])) - min(counts(labels[found])) <= 1
    if limit == 1000:
        assert counts(labels[evenly_spaced(5000, limit)]) != [100] * 10, "by place alone it would not be balanced"


def test_classes_of_different_sizes_keep_their_shares():
    """So that the accuracy on the part stands for that on the whole. The slow way: class by class."""
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat(np.arange(10), rng.integers(1, 900, 10)))
    for limit in (3, 50, 777):
        part = np.array(counts(labels[spread(labels, NAMES, limit)]))
        exact = np.bincount(labels) * limit / len(labels)
        assert (abs(part - exact) < 1).all() and part.sum() == limit


def test_within_a_class_the_images_are_evenly_spaced():
    labels = np.arange(3000) % 10
    found = spread(labels, NAMES, 60)
    for label in range(10):
        assert set(np.diff(found[labels[found] == label])) == {500}


def test_a_set_sorted_by_class_gives_the_images_that_it_always_gave():
    labels = np.repeat(np.arange(10), np.arange(3, 33, 3))
    for limit in (1, 9, 50, 164, 165, None):
        assert spread(labels, NAMES, limit).tolist() == evenly_spaced(165, limit).tolist()


def test_the_order_of_the_names_makes_no_difference():
    """`verify` has the labels of the model, `evaluate` cuts by those of the set."""
    labels, other = np.random.default_rng(2).integers(0, 10, 500), np.random.default_rng(3).permutation(10)
    names = tuple(NAMES[i] for i in np.argsort(other))
    assert spread(other[labels], names, 33).tolist() == spread(labels, NAMES, 33).tolist()


def test_a_real_set_is_balanced_and_says_which_images_it_holds():
    fashion_mnist()
    whole = load("fashion_mnist", "test")
    assert whole.numbers is None and whole.chosen == "all"
    part = load("fashion_mnist", "test", limit=200)
    assert counts(part.labels.numpy()) == [20] * 10 and part.chosen == SPREAD
    assert torch.equal(part.images, whole.images[part.numbers]) and torch.equal(part.labels, whole.labels[part.numbers])
    few = part.take([5, 7])
    assert few.numbers.tolist() == part.numbers[[5, 7]].tolist()
    assert load("fashion_mnist", "train", limit=70).numbers.tolist() == evenly_spaced(60000, 70).tolist(), "as ever"


def test_an_image_folder_says_which_images_it_holds(photos):
    whole, part = (load("image_folder", "test", photos, resolution=32, limit=limit) for limit in (None, 5))
    assert whole.numbers is None
    assert torch.equal(part.images, whole.images[part.numbers])
    assert max(np.bincount(part.labels)) == 2


@pytest.mark.parametrize("name", ["torch", "dali"])
def test_prepared_files_give_the_same_images(written, photos, name):
    from fastrobust.config import reading

    settings = {
        "name": "x", "device": "cpu", "epsilon": 0.1, "loader": name, "model": {"name": "preact_resnet18_w16"},
        "data": {"dataset": "image_folder", "path": str(photos), "prepared": str(written / "jpeg" / "x-dali")},
        "method": {"name": "fgsm"}, "optimizer": {"name": "sgd"}, "schedule": {"name": "cyclic", "max_lr": 0.1},
        "phases": [{"epochs": 1, "batch_size": 4, "resolution": 32, "resize": 64}],
    }  # fmt: skip
    if not loaders.available(name):
        pytest.skip("DALI is not installed")
    settings["data"]["augment"] = {"crop": "random_resized"}
    config = loaders.resolve(reading.parse(settings, "test"), CPU)
    whole, part = loaders.test_set(config, None), loaders.test_set(config, 5)
    assert whole.numbers is None and torch.equal(part.images, whole.images[part.numbers])
    assert part.numbers.tolist() == load("image_folder", "test", photos, resolution=32, limit=5).numbers.tolist()


@pytest.mark.parametrize("dataset", ["image_folder", "imagenette"])
def test_training_images_are_among_those_that_the_run_was_trained_on(config_of, dataset):
    """At the run's resolution, also where the data set has images of many sizes; the masking checks train on them."""
    config = config_of(data__limit=65, data__dataset=dataset)
    classes = tuple(f"bar{i}" for i in range(10))
    trained = Trained(build_model(config, classes), config, classes, start.Path("x"), "")
    whole = load(dataset, "train", config.data.path, resolution=28)
    of_the_run = evenly_spaced(len(whole.labels), 65)
    found = trained.training_images(20)
    assert found.numbers.tolist() == of_the_run[evenly_spaced(65, 20)].tolist()
    assert torch.equal(found.images, whole.images[found.numbers])
    assert len(trained.training_images(500).labels) == 65
