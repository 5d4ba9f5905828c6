"""A tiny data set and a run on it that takes under a second and has everything: two phases, a kept perturbation, the guard,
an evaluation at two radii."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from fastrobust.models.weights import read_weights
from fastrobust.runtime import run_directory

CONFIG = {
    "precision": "fp32",  # the same on every processor
    "device": "cpu",
    "epsilon": 0.05,
    "data": {"dataset": "image_folder", "augment": {"crop": "none", "flip": True}},
    "model": {"name": "mnist_net"},
    "method": {"name": "fgsm", "init": "previous"},
    "optimizer": {"name": "adam"},
    "schedule": {"name": "cyclic", "max_lr": 2e-3},
    "guard": {"action": "warn"},
    "phases": [
        {"epochs": 2, "batch_size": 8, "resolution": 28},
        {"epochs": 1, "batch_size": 11, "resolution": 28},
    ],
    "evaluation": {"steps": 8, "restarts": 2, "epsilon": [0.02, 0.05]},
}


def write_images(folder: Path, train: int = 32, test: int = 20, size: int = 28) -> Path:
    """Noise with a bright bar whose place tells the class, as PNG files folder/{train,test}/<class>/<number>.png."""
    noise = np.random.default_rng(0)
    for split, count in {"train": train, "test": test}.items():
        for i in range(count):
            pixels = noise.integers(0, 128, (size, size, 3), np.uint8)
            pixels[size * (i % 10) // 10 :][:3] |= 128
            file = folder / split / f"bar{i % 10}" / f"{i:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    return folder


def write_config(folder: Path, data: Path, name: str = "tiny", **changes) -> Path:
    """A YAML file of the tiny run `name`, which goes to folder/runs/name."""
    config = copy.deepcopy(CONFIG) | {"name": name, "output": str(folder / "runs")} | changes
    config["data"]["path"] = str(data)
    config["evaluation"] = {"precision": "fp32"} | config["evaluation"]
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def result(directory: Path) -> dict:
    """What a finished run came to, without times: equal for runs that are equal bit by bit."""
    metrics = [json.loads(line) for line in (directory / run_directory.METRICS).read_text().splitlines()]
    summary = json.loads((directory / run_directory.SUMMARY).read_text())
    evaluations = [{k: v for k, v in e.items() if k != "seconds"} for e in summary["evaluations"]]
    return {
        "weights": {name: t.numpy().tobytes() for name, t in read_weights(directory)[0].state_dict().items()},
        "metrics": [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in metrics],
        "evaluations": evaluations,
    }
