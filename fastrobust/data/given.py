"""Images that a program gives from Python: tensors, arrays, a torch Dataset or a torchvision one -> uint8 arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from fastrobust.data.colours import plain
from fastrobust.data.image_set import ImageSet
from fastrobust.runtime.errors import DataError, first_line
from fastrobust.runtime.progress import Progress

EXACT = 1e-3  # pixels of [0, 255]: floats this near to whole numbers are taken for images that were divided by 255


class Given(NamedTuple):
    """images: uint8 N x H x W x C. labels: int64 N. classes: names in label order."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]


def read(data: Any, classes: Sequence[str] | None = None) -> Given:
    """(images, labels) or a Dataset of (image, label). Images are uint8 or floats in [0, 1]: tensors N x C x H x W, arrays N
    x H x W x C, or PIL images; labels are whole numbers from 0. Raises DataError."""
    if isinstance(data, tuple | list) and len(data) == 2 and not isinstance(data[0], tuple):
        images, labels = data
    elif hasattr(data, "__array__"):
        raise DataError("the labels are missing: give them beside the images")
    elif hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        classes = names_of(data) if classes is None else classes
        images, labels = _items(data)
    else:
        raise DataError(
            f"data must be (images, labels), a Dataset with a length, a folder or the name of a data set, not a "
            f"{type(data).__name__}"
        )
    pixels = to_uint8(images)
    labels = whole_numbers(labels)
    if len(pixels) != len(labels):
        raise DataError(f"there are {len(pixels)} images and {len(labels)} labels")
    names = tuple(map(str, range(int(labels.max()) + 1) if classes is None else classes))
    if labels.max() >= len(names):
        raise DataError(f"label {labels.max()} is none of the {len(names)} classes, 0 to {len(names) - 1}")
    if len(np.unique(labels)) < 2:
        raise DataError(f"all {len(labels)} images are of one class: there is nothing to tell apart")
    return Given(pixels, labels, names)


def read_for(classes: tuple[str, ...], data: Any, whose: str) -> Given:
    """Images for a model of these classes. A Dataset that names its own (`names_of`) is matched by name; names that it has
    no images of are no matter. Else labels are indices into `classes`. Raises DataError."""
    if isinstance(data, tuple | list) or names_of(data) is None:
        return read(data, classes)
    found = read(data)
    if not set(found.classes) & set(classes) and len(found.classes) == len(classes):
        names = ", ".join(found.classes[:3]), ", ".join(classes[:3])
        print(
            f"note: the images' classes ({names[0]}, …) are taken for {whose}'s ({names[1]}, …) by their numbers", flush=True
        )
        return found._replace(classes=classes)
    kept = [k for k, name in enumerate(found.classes) if name in classes or (found.labels == k).any()]
    images, labels = torch.from_numpy(found.images).permute(0, 3, 1, 2), np.searchsorted(kept, found.labels)
    named = ImageSet(images, torch.from_numpy(labels), tuple(found.classes[k] for k in kept), "the Dataset")
    matched = named.labelled_as(classes, whose)
    return found._replace(labels=matched.labels.numpy(), classes=classes)


def names_of(data: Any) -> Sequence[str] | None:
    """The names of a Dataset's classes: its own `classes`, as torchvision's have them, or those below torch's Subset and
    ConcatDataset. Raises DataError where the parts of one name others."""
    if getattr(data, "classes", None) is not None:
        return data.classes
    if isinstance(data, Subset):
        return names_of(data.dataset)
    if isinstance(data, ConcatDataset):
        found = [names for part in data.datasets if (names := names_of(part)) is not None]
        if any(list(names) != list(found[0]) for names in found):
            raise DataError("the parts of the ConcatDataset name other classes: give them one list, in one order")
        return found[0] if found else None
    return None


def _items(data: Any) -> tuple[list, list]:
    images, labels = [], []
    if not len(data):
        raise DataError(f"there are no images: the {type(data).__name__} is empty")
    with Progress("read images", len(data)) as bar:
        for i in range(len(data)):
            try:
                image, label = data[i][:2]
            except Exception as error:  # the user's code can raise anything
                raise DataError(
                    f"item {i} of the data set cannot be read: {type(error).__name__}: {first_line(error)}"
                ) from error
            images.append(image if isinstance(image, Tensor) else pixels_of(image))
            labels.append(label)
            bar.advance(1, "" if bar.due() else None)
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) != 1:
        found = "; ".join(map(str, sorted(shapes)[:3]))
        raise DataError(f"the images must be of one shape, found {found}: resize them first")
    return (torch.stack(images) if isinstance(images[0], Tensor) else np.stack(images)), labels


def pixels_of(image: Any) -> np.ndarray:
    """One of Pillow's images, or what is an array already."""
    return np.asarray(plain(image) if isinstance(image, Image) else image)


FROM_ONE = "no label is 0: classes are numbered from 0. Where they count from 1, subtract 1; else name all with `classes`"


def whole_numbers(labels: Any) -> np.ndarray:
    """Labels as int64 N. Raises DataError."""
    found = as_numpy(labels) if isinstance(labels, Tensor) else np.asarray(labels)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "iu":
        raise DataError(f"labels must be whole numbers, one for each image; they are {found.dtype} {found.shape}")
    if found.min() < 0:
        raise DataError(f"label {found.min()} is negative: classes are numbered from 0")
    return found.astype(np.int64)


def as_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor's values; NumPy has no bfloat16."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy()


def channels_first(images: Any) -> np.ndarray:
    """Images that are no tensor as an array N x C x H x W; they may be N x H x W, or N x H x W x C with C 1 or 3. Raises
    DataError for a Dataset."""
    if not isinstance(images, list | tuple) and not hasattr(images, "__array__"):
        raise DataError(
            f"images with labels beside them are a tensor or an array, not a {type(images).__name__}; a Dataset holds its "
            "labels: give it alone"
        )
    found = np.asarray([pixels_of(image) for image in images] if isinstance(images, list | tuple) else images)
    found = found[..., None] if found.ndim == 3 else found
    return found.transpose(0, 3, 1, 2) if found.ndim == 4 and found.shape[3] in (1, 3) else found


def check_bytes(images: np.ndarray | Tensor) -> None:
    """Raise DataError for uint8 images of 0 and 1 alone: nearly black, where black and white are meant."""
    if images.max() == 1:
        raise DataError("images of uint8 are pixels from 0 to 255, these are 0 and 1 alone: multiply by 255, or give floats")


def to_uint8(images: Any) -> np.ndarray:
    """uint8 N x H x W x C. Floats are rounded to steps of 1/255, which is said where it changes them. Raises DataError."""
    found = as_numpy(images) if isinstance(images, Tensor) else channels_first(images)
    if not found.size:
        raise DataError("there are no images")
    found = found[:, None] if found.ndim == 3 else found
    found = found.transpose(0, 2, 3, 1) if found.ndim == 4 else found
    if found.ndim != 4 or found.shape[3] not in (1, 3) or found.shape[1] != found.shape[2]:
        shape = tuple(images.shape) if hasattr(images, "shape") else found.shape
        raise DataError(f"images must be N x C x H x W with C 1 or 3, and square; they are {shape}")
    if found.dtype == np.uint8:
        check_bytes(found)
        return np.ascontiguousarray(found)
    if found.dtype.kind != "f":
        raise DataError(f"images must be uint8, or floats in [0, 1]; they are {found.dtype}")
    low, high = float(found.min()), float(found.max())
    if not np.isfinite([low, high]).all():
        bad = np.flatnonzero(~np.isfinite(found).all((1, 2, 3)))
        raise DataError(f"{len(bad)} images have pixels that are no finite numbers, the first is image {bad[0]}")
    if not (low >= 0 and high <= 1):
        hint = (
            "divide by 255" if low >= 0 and high <= 255 else "leave their normalisation out, the model's first layer does it"
        )
        raise DataError(f"images must lie in [0, 1]; they reach from {low:g} to {high:g}: {hint}")
    scaled = found * np.float32(255)
    rounded = np.rint(scaled)
    if np.abs(scaled - rounded).max() > EXACT:
        print("note: the images are not steps of 1/255, and were rounded to them", flush=True)
    return np.ascontiguousarray(rounded.astype(np.uint8))
