"""Downloads through torchvision, which compares checksums."""

from __future__ import annotations

import contextlib
from pathlib import Path

from fastrobust.runtime.errors import DataError
from fastrobust.runtime.torchvision_compat import import_torchvision

CLASSES = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
}


def fetch(dataset: str, root: Path) -> None:
    """Raises DataError, and leaves no empty folders then."""
    datasets = import_torchvision().datasets
    kind, parts = CLASSES[dataset], [{"split": split} for split in ("train", "test")] if dataset == "svhn" else [{}]
    made = [folder for folder in (root / kind / "raw", root / kind, root, *root.parents) if not folder.exists()]
    print(f"{dataset} is downloaded to {root.absolute()}", flush=True)
    try:
        for part in parts:
            getattr(datasets, kind)(str(root), download=True, **part)
    except Exception as error:  # whatever the network, the server or the disk came up with
        for folder in made:
            with contextlib.suppress(OSError):  # what is not empty stays
                folder.rmdir()
        raise DataError(
            f"{dataset} could not be downloaded to {root} ({type(error).__name__}: {error}). "
            "Check the network and the folder, or copy the data set there"
        ) from error
