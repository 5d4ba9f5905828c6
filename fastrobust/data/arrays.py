"""Images in one file of NumPy's: `data.dataset: arrays`, `data.path: FILE.npz`.

The file holds `train_images`, `train_labels`, `test_images`, `test_labels` and, if the classes have names, `classes`. Images
are uint8, N x H x W x C or N x H x W for grey ones, square; labels are whole numbers from 0. One split may be missing.
"""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fastrobust.config.datasets import Dataset
from fastrobust.data.given import FROM_ONE, whole_numbers
from fastrobust.runtime.errors import DataError, first_line
from fastrobust.runtime.files import explained, kind_of, mistaken, write_atomically

SPLITS = ("train", "test")


def dataset(path: str | None) -> Dataset:
    """What the file holds, by its headers. Of a file that is not there nothing is known, so that a trained model can be
    opened without it. Raises DataError."""
    if path is None:
        raise DataError("data.dataset: arrays needs data.path, a .npz file: see docs/data.md")
    if not Path(path).exists():
        return Dataset(None, None, None, (), (), read)
    with opened(path) as file:
        names = [f"{split}_images" for split in SPLITS if f"{split}_images" in file.files]
        forms = {form_of(file, name, path) for name in names}
        if len(forms) != 1:
            found = "images of two forms" if forms else f"neither train_images nor test_images: {', '.join(file.files)}"
            raise DataError(f"{path} holds {found}")
        side, channels = forms.pop()
        classes = file["classes"].tolist() if "classes" in file.files else None
        if classes is None:
            labels = [whole_numbers(file[f"{name.split('_')[0]}_labels"]) for name in names]
            if min(int(numbers.min()) for numbers in labels) > 0:
                raise DataError(f"{path}: {FROM_ONE}")
            classes = range(max(int(numbers.max()) for numbers in labels) + 1)
    return Dataset(channels, side, tuple(map(str, classes)), (0.0,) * channels, (1.0,) * channels, read)


def form_of(file: np.lib.npyio.NpzFile, name: str, path: str | Path) -> tuple[int, int]:
    """(side, channels) of the images, without reading them. Raises DataError."""
    with file.zip.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(member)
    form = (*shape[1:], 1) if len(shape) == 3 else shape[1:]
    if dtype != np.uint8 or len(form) != 3 or form[0] != form[1] or form[2] not in (1, 3) or not shape[0]:
        raise DataError(f"{path}: {name} must be uint8, N x H x W x 3 or N x H x W, square; it is {dtype} {shape}")
    return form[0], form[2]


def read(split: str, path: str | None) -> tuple[np.ndarray, np.ndarray]:
    """The images of a split, uint8 N x H x W x C, and their labels. Raises DataError."""
    with opened(path) as file:
        absent = [name for name in (f"{split}_images", f"{split}_labels") if name not in file.files]
        if absent:
            raise DataError(f"{path} has no {' and no '.join(absent)}: it holds {', '.join(file.files)}")
        images, labels = file[f"{split}_images"], file[f"{split}_labels"]
    return images[..., None] if images.ndim == 3 else images, labels


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[np.lib.npyio.NpzFile]:
    """The file, with nothing of it read yet. Raises DataError, also for what goes wrong while it is read."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
        if problem := mistaken(start):
            raise DataError(f"{path} {problem}")
        if not zipfile.is_zipfile(path):
            told = f"is {kind}, not" if (kind := kind_of(start)) else "is not"
            raise DataError(f"{path} {told} a whole .npz file: write it with numpy.savez")
        with np.load(path, allow_pickle=False) as found:
            yield found
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from None


def write(path: Path, splits: dict[str, tuple[np.ndarray, np.ndarray]], classes: Sequence[str]) -> None:
    """Write the file in one piece. splits: "train" or "test" -> (images, uint8 N x H x W x C, and labels, int64 N)."""
    arrays = {"classes": np.array(list(classes))}
    for split, (images, labels) in splits.items():
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    with explained(f"{path} cannot be written"):
        write_atomically(path, lambda file: np.savez(file, **arrays))
