"""The one way to open a trained model and the images that it is judged on."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fastrobust.config.schema import Config
from fastrobust.data import loaders
from fastrobust.data.sets import ImageSet
from fastrobust.models.weights import read_weights, weights_digest
from fastrobust.runtime import run_directory
from fastrobust.runtime.errors import DataError


@dataclass(frozen=True)
class Trained:
    """A model in eval mode, the resolved config that it was trained with, its class names in the order of its logits, and
    the run directory or weights file that it came from. digest: of the weights, whichever file they are in. own: the config
    as it is stored, where `config` has the data set from another place."""

    model: nn.Module
    config: Config
    classes: tuple[str, ...]
    path: Path
    digest: str
    own: Config | None = None

    def images(self, limit: int | None = None) -> ImageSet:
        """The test images, or `limit` of them (`data.held_out.spread`); labels count as the model's classes do. Raises
        DataError, also where the images are of classes that the model does not know."""
        found = loaders.test_set(self.config, limit).labelled_as(self.classes, str(self.path))
        run = self.path if self.path.is_dir() else self.path.parent
        if self.config.data.held_out and (trained_on := set(run_directory.read_images(run) or ()) & set(found.names)):
            raise DataError(
                f"{len(trained_on)} of the held-out images were trained on, such as {min(trained_on)}: the training images "
                f"in {found.source} are no longer those that {run} was begun with. Put them back"
            )
        held_out = loaders.test_split(self.config) == "held_out"
        if held_out and run_directory.read_digest(run) not in (None, loaders.digest(self.config)):
            raise DataError(
                f"the training images in {self.config.data.prepared} are no longer those that {run} was begun with, so that "
                "held-out images may have been trained on. Put them back, or train anew"
            )
        return found

    def training_images(self, limit: int) -> ImageSet:
        """`limit` of the images that it was trained on (of those that `data.limit` leaves), evenly spaced. Where these are
        gone, of the training images beside the test images. Raises DataError."""
        try:
            found = loaders.still(self.own or self.config, "train", limit)
        except DataError:
            if self.own is None:
                raise
            found = loaders.still(self.config, "train", limit)
        return found.labelled_as(self.classes, str(self.path))


def open_trained(path: str | Path, data: str | None = None, device: torch.device | str = "cpu") -> Trained:
    """Open a run directory or a weights file. With `data` the data set is read from that folder or file instead of where the
    run's config says, from the source and not from prepared files. Raises RunError or ConfigError."""
    model, config, classes = read_weights(path)
    own = config if data else None
    config = loaders.from_source(config, data) if data else loaders.resolve(config, torch.device("cpu"))
    model = model.to(device, memory_format=torch.channels_last)
    return Trained(model, config, classes, Path(path), weights_digest(model), own)
