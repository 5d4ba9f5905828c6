"""What is fixed about each data set: one table. A data set of one's own is a `Dataset` too, `package.module:name`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastrobust.config import parts
from fastrobust.runtime.errors import ConfigError


@dataclass(frozen=True)
class Dataset:
    """None stands for what the user's files and settings decide.

    channels: 1 (grey) or 3 (RGB). size: height and width in pixels. classes: their names in label order. mean, std: the
    normalisation that a model starts with, for pixels in [0, 1], one value for each channel. read: for a data set that is
    not one of the built-in formats, a function of (split, path), split being "train" or "test" and path the config's
    `data.path`; it returns images, uint8 N x H x W x C, and labels, int64 N.
    """

    channels: int
    size: int | None
    classes: tuple[str, ...] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    read: Callable[[str, str | None], tuple[Any, Any]] | None = None


_FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_RAW = ((0.0,), (1.0,))  # the authors train MNIST on raw pixels
_PHOTOS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's

DATASETS: dict[str, Dataset] = {
    "mnist": Dataset(1, 28, tuple("0123456789"), *_RAW),
    "fashion_mnist": Dataset(1, 28, _FASHION, *_RAW),
    "cifar10": Dataset(3, 32, _CIFAR, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "imagenet": Dataset(3, None, None, *_PHOTOS),
    "imagenette": Dataset(3, None, None, *_PHOTOS),
    "image_folder": Dataset(3, None, None, *_PHOTOS),
}


def facts(name: str) -> Dataset:
    """The data set of this name. Raises ConfigError."""
    if name in DATASETS:
        return DATASETS[name]
    found = parts.find("data.dataset", dict.fromkeys(DATASETS, ""), name)
    if not isinstance(found, Dataset) or found.read is None or found.size is None or found.classes is None:
        raise ConfigError(f"data.dataset: '{name}' must be a fastrobust.config.datasets.Dataset with size, classes and read")
    if found.channels not in (1, 3):
        raise ConfigError(f"data.dataset: '{name}' has {found.channels} channels: it must have 1 or 3")
    return found
