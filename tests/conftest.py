"""A made-up data set, configs of small runs on it, and one finished run that tests may read but not change."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

torch.set_num_threads(1)  # the models here are too small to gain from more


def bar_images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 count x 28 x 28 x 3, labels): class c has a bright bar, horizontal for c < 5 and vertical for the others, at
    a place that depends on c. Classes are of one size."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    images = rng.normal(0.2, 0.1, (count, 28, 28, 3))
    for image, label in zip(images, labels, strict=True):
        place = 2 + 5 * (label % 5) + rng.integers(-1, 2)
        bar = image[place : place + 3] if label < 5 else image[:, place : place + 3]
        bar += rng.uniform(0.1, 0.7)  # some are faint
    return (images.clip(0, 1) * 255).round().astype(np.uint8), labels


def write_folder(root: Path, train: int, test: int) -> Path:
    """An image folder of bars, as PNG files: root/{train,test}/<class>/<number>.png."""
    for seed, (split, count) in enumerate({"train": train, "test": test}.items()):
        for i, (image, label) in enumerate(zip(*bar_images(count, seed), strict=True)):
            file = root / split / f"bar{label}" / f"{i:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
    return root


@pytest.fixture(scope="session")
def bars(tmp_path_factory) -> Path:
    """600 train and 200 test images of 10 classes, 28 x 28."""
    return write_folder(tmp_path_factory.mktemp("bars"), 600, 200)


@pytest.fixture(scope="session")
def few_bars(tmp_path_factory) -> Path:
    """70 train and 20 test images."""
    return write_folder(tmp_path_factory.mktemp("few_bars"), 70, 20)


@pytest.fixture(scope="session")
def settings(bars):
    """settings(output, key=value, data__limit=9, ...) -> the config of a small run, as a dict: `__` stands for a dot, and
    None takes a key away."""
    base = {
        "name": "bars",
        "device": "cpu",
        "epsilon": 0.05,
        "data": {"dataset": "image_folder", "path": str(bars)},
        "model": {"name": "mnist_net"},
        "method": {"name": "fgsm"},
        "optimizer": {"name": "adam"},
        "schedule": {"name": "cyclic", "max_lr": 5e-3},
        "phases": [{"epochs": 3, "batch_size": 20, "resolution": 28}],
        "evaluation": {"steps": 7, "restarts": 2, "epsilon": [0.1, 0.05]},
    }

    def make(output: Path, **changes) -> dict:
        result = copy.deepcopy(base) | {"output": str(output)}
        for key, value in changes.items():
            *parents, last = key.split("__")
            node = result
            for part in parents:
                node = node.setdefault(part, {})
            if value is None:
                del node[last]
            else:
                node[last] = copy.deepcopy(value)
        return result

    return make


@pytest.fixture(scope="session")
def config_file(settings):
    """config_file(folder, **changes) -> a YAML file in the folder, of a run that goes to folder/runs."""

    def make(folder: Path, **changes) -> Path:
        file = folder / "bars.yaml"
        file.write_text(yaml.safe_dump(settings(folder / "runs", **changes)))
        return file

    return make


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, config_file) -> Path:
    """The directory of a finished FGSM run of 3 epochs, made by the train command."""
    from fastrobust import train

    folder = tmp_path_factory.mktemp("finished")
    assert train.main([str(config_file(folder))]) == 0
    return folder / "runs" / "bars"
