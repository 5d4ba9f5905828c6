"""Accuracy under common corruptions (Hendrycks & Dietterich, 2019): `fastrobust evaluate RUN --corruptions FOLDER`.

labels.npy, fog.npy, snow.npy, …               CIFAR-10-C, CIFAR-100-C: severities 1 to 5, one after the other in each file
fog/1/<class>/<image>, …, fog/5/…, snow/1/…    ImageNet-C; folders noise/, blur/, weather/, … may be around
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fastrobust.attack.verdicts import classified
from fastrobust.data import formats
from fastrobust.data.held_out import SPREAD, spread
from fastrobust.data.image_set import ImageSet
from fastrobust.evaluation.trained import Trained
from fastrobust.runtime.errors import DataError, first_line
from fastrobust.runtime.files import write_json
from fastrobust.runtime.progress import Progress

SEVERITIES = ("1", "2", "3", "4", "5")
COMMON = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
CHUNK = 2000  # photographs in memory at once


def evaluate(trained: Trained, folder: str, limit: int | None, batch_size: int, kept: Path | None) -> dict[str, Any]:
    """Accuracies by corruption and severity, and their mean; printed, and written to `kept`. Raises DataError."""
    place = Path(folder)
    names = sorted(file.stem for file in place.glob("*.npy") if file.stem != "labels")
    folders = {} if names else severity_folders(place)
    if not names and not folders:
        raise DataError(f"{folder} holds neither CORRUPTION.npy with labels.npy nor folders CORRUPTION/1 to CORRUPTION/5")
    names, device = names or sorted(folders), next(trained.model.parameters()).device
    rows: dict[str, list[float]] = {}
    examples = 0
    with Progress("corruptions", len(names) * len(SEVERITIES)) as bar:
        for name in names:
            rows[name] = []
            parts = of_photographs(folders[name], trained, limit) if folders else of_array(place, name, trained, limit)
            for severity in parts:
                right = total = 0
                for data in severity:
                    data = data.labelled_as(trained.classes, str(trained.path))
                    found = classified(trained.model, data.images.to(device), data.labels.to(device), batch_size)
                    right, total = right + int(found.sum()), total + len(data.labels)
                if examples not in (0, total):
                    raise DataError(f"{folder}: {name} has {total} images where another corruption has {examples}")
                examples = total
                rows[name].append(right / total)
                bar.advance(1, name if bar.due() else None)
    counted = [name for name in names if name in COMMON] or names
    result = {
        "folder": str(place.absolute()),
        "examples": examples,
        "chosen": "all" if limit is None else SPREAD,
        "weights": trained.digest,
        "resolution": trained.config.phases[-1].resolution,
        "mean_accuracy": float(np.mean([rows[name] for name in counted])),
        "mean_over": counted,
        "accuracies": rows,
    }
    show(result, kept)
    return result


def of_array(place: Path, name: str, trained: Trained, limit: int | None) -> Iterator[Iterator[ImageSet]]:
    """For each severity the images of a file of CIFAR-10-C's form. The labels are numbers: they mean what they mean in the
    run's data set. Raises DataError."""
    labels, pixels = array(place / "labels.npy"), array(place / f"{name}.npy")
    classes, side, channels = (
        trained.config.facts.classes,
        trained.config.phases[-1].resolution,
        len(trained.config.model.mean),
    )
    if classes is None:
        raise DataError(
            f"{place} has numbers for labels, and the classes of {trained.config.data.dataset} have none of their own"
        )
    count = len(labels) // 5
    if labels.ndim != 1 or not count or len(labels) % 5 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{place / 'labels.npy'} must hold the labels of five severities: it is {labels.dtype} {labels.shape}"
        )
    if pixels.dtype != np.uint8 or pixels.shape != (5 * count, side, side, channels):
        form = f"uint8 {(5 * count, side, side, channels)}"
        raise DataError(f"{place / name}.npy is {pixels.dtype} {pixels.shape}, not {form}: is it of another data set?")
    formats.check_labels(labels, len(classes), place / "labels.npy")
    for k in range(5):
        part = slice(k * count, (k + 1) * count)
        keep = spread(labels[part], classes, limit)
        images = torch.from_numpy(np.ascontiguousarray(pixels[part][keep])).permute(0, 3, 1, 2)
        yield iter([ImageSet(images, torch.from_numpy(labels[part][keep].astype(np.int64)), classes, f"{place / name}.npy")])


def array(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} cannot be read ({first_line(error)}): fetch it again") from None


def severity_folders(place: Path) -> dict[str, Path]:
    """Corruption -> the folder that holds its severities. Raises DataError where one is not whole."""
    found = {}
    for folder in [*place.glob("*/"), *place.glob("*/*/")]:
        there = [severity for severity in SEVERITIES if (folder / severity).is_dir()]
        if there and len(there) < len(SEVERITIES):
            raise DataError(f"{folder} lacks severities: it has {', '.join(there)} of 1 to 5")
        if there and folder.name in found:
            raise DataError(f"{place} has {folder.name} twice: in {found[folder.name].parent} and {folder.parent}")
        if there:
            found[folder.name] = folder
    return found


def of_photographs(folder: Path, trained: Trained, limit: int | None) -> Iterator[Iterator[ImageSet]]:
    """For each severity the images of a folder of ImageNet-C's form, some at a time. Raises DataError."""
    side, channels = trained.config.phases[-1].resolution, len(trained.config.model.mean)
    for severity in SEVERITIES:
        members = [m for m in formats.folder_members(folder / severity) if "/" in m.name and formats.is_image(m.name)]
        members.sort(key=lambda member: member.name)
        if not members:
            raise DataError(f"{folder / severity} holds no images: it must be <class>/<image>")
        names = [member.name.partition("/")[0] for member in members]
        classes = tuple(sorted(set(names)))
        labels = np.array([classes.index(name) for name in names])
        keep = spread(labels, classes, limit)

        def chunks(
            members=members, labels=labels, classes=classes, keep=keep, where=folder / severity
        ) -> Iterator[ImageSet]:
            for start in range(0, len(keep), CHUNK):
                part = keep[start : start + CHUNK]
                images = formats.decode_all([members[i] for i in part], side, True, channels)
                yield ImageSet(
                    torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels[part]), classes, str(where)
                )

        yield chunks()


def show(result: dict[str, Any], kept: Path | None) -> None:
    table = Table("corruption", *SEVERITIES, "mean", box=None, pad_edge=False)
    for name, accuracies in result["accuracies"].items():
        mark = "" if name in result["mean_over"] else " *"
        table.add_row(name + mark, *(f"{a:.1%}" for a in accuracies), f"{np.mean(accuracies):.2%}")
    for column in table.columns[1:]:
        column.justify = "right"
    print(f"test images      {result['examples']} for each corruption and severity, {result['resolution']} pixels wide")
    print(f"                 {result['folder']}")
    Console(highlight=False).print(table)
    print(f"mean accuracy    {result['mean_accuracy']:.2%} over {len(result['mean_over'])} corruptions and 5 severities")
    if len(result["mean_over"]) < len(result["accuracies"]):
        print("                 * not one of the 15 of the benchmark, and not in the mean")
    if kept:
        about = "\n".join([result["folder"], result["weights"], str(result["examples"])])
        file = kept / f"corruptions_{hashlib.sha256(about.encode()).hexdigest()[:12]}.json"
        write_json(file, result)
        print(f"kept in          {file}")
