"""SVHN, cropped digits (Netzer et al., 2011): `train_32x32.mat` and `test_32x32.mat`. Extra images are not read."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from fastrobust.config.datasets import Dataset
from fastrobust.data import formats, sets
from fastrobust.runtime.errors import DataError, first_line

FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat"}


def read(split: str, path: str | None) -> tuple[np.ndarray, np.ndarray, str]:
    """Images, uint8 N x 32 x 32 x 3, labels and the file that they come from. The files number the digit 0 as 10: it becomes
    label 0. Raises DataError."""
    file = sets.find("svhn", ["svhn", "SVHN", "."], path, problem) / FILES[split]
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError(f"reading {file} needs scipy: pip install scipy") from None
    with formats.opened(file) as stream:
        content = stream.read()
    try:
        found = loadmat(io.BytesIO(content), variable_names=["X", "y"])
        pixels, labels = found["X"], found["y"]
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3):
            raise ValueError(f"X is {pixels.dtype} {pixels.shape}, not uint8 32 x 32 x 3 x N")
        if labels.dtype.kind not in "iu" or labels.shape != (pixels.shape[3], 1):
            raise ValueError(f"y is {labels.dtype} {labels.shape} for {pixels.shape[3]} images")
    except Exception as error:  # a damaged file of Matlab's can raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{file} is damaged or not SVHN's ({reason}): fetch it again") from error
    labels = labels[:, 0].astype(np.int64)
    if labels.min() < 1 or labels.max() > 10:
        odd = labels.min() if labels.min() < 1 else labels.max()
        raise DataError(f"{file}: label {odd} is outside 1..10; SVHN's files number the digit 0 as 10: fetch the file again")
    return pixels.transpose(3, 0, 1, 2), labels % 10, str(file)


def problem(place: Path) -> str | None:
    """Why a folder cannot be the data set, judged by the names of its files; None if it can."""
    absent = [name for name in FILES.values() if not (place / name).is_file()]
    return (f"lacks {', '.join(absent)}" if place.exists() else "does not exist") if absent else None


# means and standard deviations of the training pixels
# mean, std: see fastrobust.config.datasets
SVHN = Dataset(3, 32, tuple("0123456789"), (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), read)
