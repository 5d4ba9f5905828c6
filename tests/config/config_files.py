"""A small config file, and what is said about a wrong one."""

from pathlib import Path

import pytest

from fastrobust.config.reading import load
from fastrobust.runtime.errors import ConfigError

ROOT = Path(__file__).parents[2]
MINIMAL = """\
epsilon: 8/255
data: {dataset: cifar10}
model: {name: preact_resnet18}
method: {name: fgsm}
optimizer: {name: sgd}
schedule: {name: cyclic, max_lr: 0.2}
phases:
  - {epochs: 15, batch_size: 128}
"""
FOLDER = ("data.dataset=image_folder", "data.path=somewhere", "model.name=resnet50")


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


def refusal_of_text(path: Path, text: str) -> str:
    path.write_text(text)
    return refusal(path)
