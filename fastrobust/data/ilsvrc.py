"""ImageNet as image-net.org gives it out: a tar of one tar for each class, a flat tar of the validation images, and a
development kit that holds their labels. Read where they are; nothing is unpacked.

torchvision's reader of the same files unpacks them, 150 GB, and takes the kit only by its checksum; the meaning of the
kit's tables here is as there.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from fastrobust.data import formats
from fastrobust.runtime.errors import DataError, first_line, installing

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
_TRUTH, _META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"


def folder_of(place: Path) -> Path | None:
    """The folder of the official archives, if this is it or one of the images' archives in it."""
    if place.is_file():
        return place.parent if place.name in (TRAIN, VAL) else None
    return place if any((place / name).is_file() for name in (TRAIN, VAL)) and not (place / "train").is_dir() else None


def members(folder: Path) -> Iterator[formats.Member]:
    """All images, named as in an image folder: train/<WordNet number>/<file>, val/… likewise. Raises DataError."""
    for name, holds in ((TRAIN, "training images"), (VAL, "validation images"), (DEVKIT, "validation images' labels")):
        if not (folder / name).is_file():
            raise DataError(f"{folder} lacks {name}, which holds the {holds}: fetch it from image-net.org into that folder")
    wnids = validation_classes(folder / DEVKIT)
    images = sorted(formats.tar_members(folder / VAL), key=lambda image: image.name)
    if len(images) != len(wnids):
        raise DataError(f"{folder / VAL} holds {len(images)} files, but {DEVKIT} labels {len(wnids)}: fetch both again")
    for image in formats.tar_members(folder / TRAIN, nested=True):
        yield image._replace(name=f"train/{image.name}")
    for image, wnid in zip(images, wnids, strict=True):
        yield image._replace(name=f"val/{wnid}/{image.name}")


def validation_classes(devkit: Path) -> list[str]:
    """The WordNet numbers of the validation images, in the order of their file names. Raises DataError."""
    files = {
        name: member for member in formats.tar_members(devkit) for name in (_TRUTH, _META) if member.name.endswith(name)
    }
    for name in (_TRUTH, _META):
        if name not in files:
            raise DataError(f"{devkit} lacks {name}: fetch it again")
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError(f"reading {_META} in {devkit} needs scipy: {installing('imagenet')}") from None
    try:
        synsets = loadmat(io.BytesIO(files[_META].read()), squeeze_me=True)["synsets"]
        leaves = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if s["num_children"] == 0}  # the rest are groups
        return [leaves[int(line)] for line in files[_TRUTH].read().split()]
    except Exception as error:  # a damaged file of Matlab's can raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{devkit} is damaged or another than {DEVKIT} ({reason}): fetch it again") from error
