"""What is fixed about each data set: one table. A data set of one's own, `package.module:name`, is a `Dataset` too, or a
function that makes one from the config's `data.path`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fastrobust.config import parts
from fastrobust.runtime.errors import ConfigError, FastrobustError, first_line


@dataclass(frozen=True)
class Dataset:
    """None stands for what the user's files and settings decide.

    channels: 1 (grey) or 3 (RGB). size: height and width in pixels. classes: their names in label order. mean, std: the
    normalisation that a model starts with, for pixels in [0, 1], one value for each channel. read: for a data set that is
    not one of the built-in formats, a function of (split, path), split being "train" or "test" and path the config's
    `data.path`; it returns images, uint8 N x H x W x C, and labels, int64 N, and perhaps what to call their source.
    """

    channels: int | None
    size: int | None
    classes: tuple[str, ...] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    read: Callable[[str, str | None], tuple[Any, ...]] | None = None

    def of_channels(self, channels: int | None) -> Dataset:
        """The same for images of so many channels, where the user's files decide that. Grey images are normalised by the
        means of the colours' values."""
        if self.channels is not None or channels is None:
            return self
        mean, std = ((round(sum(v) / 3, 4),) if channels == 1 else v for v in (self.mean, self.std))
        return replace(self, channels=channels, mean=mean, std=std)


_FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_RAW = ((0.0,), (1.0,))  # the authors train MNIST on raw pixels
_PHOTOS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's

# CIFAR-10's mean and std are those of its training pixels. Those of Tiny-ImageNet, and of CIFAR-100 and SVHN in their files,
# are the usual ones of public code for the training pixels; we did not compute them. For Tiny-ImageNet's std some code has
# 0.2302, 0.2265, 0.2262. Weights keep the numbers that they were trained with: they are part of the model.
DATASETS: dict[str, Dataset] = {
    "mnist": Dataset(1, 28, tuple("0123456789"), *_RAW),
    "fashion_mnist": Dataset(1, 28, _FASHION, *_RAW),
    "cifar10": Dataset(3, 32, _CIFAR, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "tiny_imagenet": Dataset(3, 64, None, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    "imagenet": Dataset(3, None, None, *_PHOTOS),
    "imagenette": Dataset(3, None, None, *_PHOTOS),
    "image_folder": Dataset(None, None, None, *_PHOTOS),
}


FROM_FILES = {  # each in a file of its own: a Dataset, or a function of data.path that makes one
    "cifar100": "fastrobust.data.cifar100:CIFAR100",
    "svhn": "fastrobust.data.svhn:SVHN",
    "arrays": "fastrobust.data.arrays:dataset",
}


def find(name: str) -> Dataset | Callable[[str | None], Dataset]:
    """The data set of this name, or what makes it from a path. Raises ConfigError."""
    if name in DATASETS:
        return DATASETS[name]
    found = parts.find("data.dataset", FROM_FILES if ":" in name else dict.fromkeys(DATASETS, "") | FROM_FILES, name)
    if not isinstance(found, Dataset) and not callable(found):
        raise not_one(name)
    return found


def facts(name: str, path: str | None = None) -> Dataset:
    """What is fixed about the data set of this name, of the files at `path` if it depends on them. Raises ConfigError."""
    found = find(name)
    if not isinstance(found, Dataset):
        try:
            found = found(path)
        except FastrobustError:
            raise
        except Exception as error:  # the user's function can raise anything
            raise ConfigError(f"data.dataset: '{name}' raised {type(error).__name__}: {first_line(error)}") from error
    if name in DATASETS or name in FROM_FILES:
        return found
    if not isinstance(found, Dataset) or found.read is None or found.size is None or found.classes is None:
        raise not_one(name)
    if found.channels not in (1, 3):
        raise ConfigError(f"data.dataset: '{name}' has {found.channels} channels: it must have 1 or 3")
    return found


def not_one(name: str) -> ConfigError:
    return ConfigError(f"data.dataset: '{name}' must be a fastrobust.config.datasets.Dataset with size, classes and read")
