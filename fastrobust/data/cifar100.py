"""CIFAR-100, the python version (Krizhevsky, 2009): pickles with fine labels, in their folder or in the archive."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastrobust.config.datasets import Dataset
from fastrobust.data import formats, sets
from fastrobust.runtime.errors import DataError

PLACES = ["cifar-100-python", "cifar-100-python.tar.gz", "cifar100"]
_NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
    forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
    mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
    sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree
    wolf woman worm
"""
CLASSES = tuple(_NAMES.split())


def read(split: str, path: str | None) -> tuple[np.ndarray, np.ndarray, str]:
    """Images, uint8 N x 32 x 32 x 3, their fine labels and the place that they come from. Raises DataError."""
    place = sets.find("cifar100", PLACES, path, problem)
    members = formats.archive_members(place) if place.is_file() else formats.folder_members(place)
    files = {member.name.rpartition("/")[2]: member for member in members}
    if "meta" in files:  # the names of the labels, where they came along
        check_names(files["meta"])
    return *formats.read_batches(files, [split], str(place), "fine_labels", 100), str(place)


def problem(place: Path) -> str | None:
    """Why a place cannot be the data set, judged by the names of its files; None if it can."""
    if not place.exists():
        return "does not exist"
    absent = [] if place.is_file() else [name for name in ("train", "test") if not (place / name).is_file()]
    return f"lacks {', '.join(absent)}" if absent else None


def check_names(meta: formats.Member) -> None:
    """Raise DataError unless the labels of a file `meta` have the names that they have here."""
    try:
        names = tuple(formats.unpickled(meta)["fine_label_names"])
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{meta.where} is damaged ({type(error).__name__}: {error}): fetch it again") from error
    if names != CLASSES:
        raise DataError(f"{meta.where} has other names of classes than CIFAR-100: use an image_folder for your own images")


# means and standard deviations of the training pixels as RobustBench has them
# mean, std: see fastrobust.config.datasets
CIFAR100 = Dataset(3, 32, CLASSES, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), read)
