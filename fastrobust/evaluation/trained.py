"""The one way to open a trained model and the images that it is judged on."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fastrobust.config.schema import Config
from fastrobust.data import loaders
from fastrobust.data.sets import ImageSet
from fastrobust.models.weights import read_weights, weights_digest


@dataclass(frozen=True)
class Trained:
    """A model in eval mode, the resolved config that it was trained with, its class names in the order of its logits, and
    the run directory or weights file that it came from. digest: of the weights, whichever file they are in."""

    model: nn.Module
    config: Config
    classes: tuple[str, ...]
    path: Path
    digest: str

    def images(self, limit: int | None = None) -> ImageSet:
        """The test images, or `limit` of them, evenly spaced over the test set; labels count as the model's classes do.
        Raises DataError, also where the images are of classes that the model does not know."""
        return loaders.test_set(self.config, limit).labelled_as(self.classes, str(self.path))

    def training_images(self, limit: int) -> ImageSet:
        """`limit` of the images that it was trained on, evenly spaced, as `images` gives the test images."""
        return loaders.still(self.config, "train", limit).labelled_as(self.classes, str(self.path))


def open_trained(path: str | Path, data: str | None = None, device: torch.device | str = "cpu") -> Trained:
    """Open a run directory or a weights file. With `data` the data set is read from that folder or file instead of where the
    run's config says, from the source and not from prepared files. Raises RunError or ConfigError."""
    model, config, classes = read_weights(path)
    config = loaders.from_source(config, data) if data else loaders.resolve(config, torch.device("cpu"))
    return Trained(model.to(device, memory_format=torch.channels_last), config, classes, Path(path), weights_digest(model))
