"""Which images of a folder or archive are of which split and class: the usual layouts of image data sets.

train/<class>/<image>, and test/... or val/... (valid/, validation/)   torchvision's ImageFolder
<any folder>/train/...                                                 one folder around it
val/images/<image>, val/val_annotations.txt                            Tiny-ImageNet as it is downloaded
val/<image>, LOC_val_solution.csv beside ILSVRC/                       ImageNet as Kaggle gives it out
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastrobust.data import formats
from fastrobust.data.formats import Member
from fastrobust.runtime.errors import DataError

SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}  # folders, in the order of preference
LAYOUT = "a folder or archive (tar, zip) of train/<class>/<image> and one of test/, val/, valid/, validation/ likewise"
KAGGLE = "LOC_val_solution.csv"
Image = tuple[str, str, Member]  # class, file name below it, where it is


class Split(NamedTuple):
    """The images of a split sorted by (class, file name), their labels (int64) and the class names in label order."""

    members: list[Member]
    labels: np.ndarray
    classes: tuple[str, ...]


def choose(members: list[Member], split: str, classes: tuple[str, ...] | None, source: str, place: Path) -> Split:
    """One split of what `place` holds. classes: those that the data set has, if that is fixed. Raises DataError."""
    members = [member for member in without_top_folder(members) if not is_hidden(member.name)]
    groups = by_folder(members, place)
    side = side_of(groups, split, source)
    images = named(groups[side], classes)
    found = {name for name, _, _ in images}
    train = {name for name, _, _ in named(groups.get("train", []), classes)}
    expected = set(classes or train or found)
    if found - expected or (split == "train" and found != expected):
        differ = ", ".join(sorted(found ^ expected)[:5])
        whose = "the data set" if classes else "train"
        raise DataError(f"{source}: {split} must have the classes of {whose}, but differs in {differ}")
    if absent := sorted(expected - found):
        print(f"note: {source} has no {split} images of {', '.join(absent[:5])}: accuracies leave them out", flush=True)
    if len(expected) < 2:
        raise DataError(
            f"{source}: all images of {side}/ are of one class, '{min(found)}'. Is the path one level too high? "
            f"It must be {LAYOUT}"
        )
    refuse_copies(members, source)
    tell_what_is_left_out(members, side, source)
    index = {name: label for label, name in enumerate(sorted(expected))}
    chosen = sorted(images)
    return Split([member for _, _, member in chosen], np.array([index[name] for name, _, _ in chosen]), tuple(index))


def without_top_folder(members: list[Member]) -> list[Member]:
    """The members by their names below the one folder that all are in, if that folder is not a split."""
    tops = {member.name.partition("/")[0] for member in members if not is_hidden(member.name)}
    known = {name for names in SPLITS.values() for name in names}
    if len(tops) != 1 or tops & known or not all("/" in m.name for m in members if not is_hidden(m.name)):
        return members
    inner = [member._replace(name=member.name.partition("/")[2]) for member in members]
    return without_top_folder(inner)


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder around it, is one that programs leave behind: .DS_Store, .ipynb_checkpoints, __MACOSX."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def by_folder(members: list[Member], place: Path) -> dict[str, list[Image]]:
    """The images of each split's folder."""
    groups: dict[str, list[Image]] = {}
    for member in members:
        folder, _, rest = member.name.partition("/")
        if "/" in rest and formats.is_image(rest):
            name, _, file = rest.partition("/")
            groups.setdefault(folder, []).append((name, file, member))
    flat = {}
    for label_of in (tiny_imagenet(members), kaggle(members, place)):
        if label_of is not None:
            flat = label_of
            groups.pop("test", None)  # these data sets' test images have no labels
    if flat:
        groups["val"] = [
            (flat[file], file, member)
            for member in members
            if member.name.startswith("val/") and (file := member.name.rpartition("/")[2]) in flat
        ]
    return groups


def tiny_imagenet(members: list[Member]) -> dict[str, str] | None:
    """File name -> class of Tiny-ImageNet's validation images, if that is what the members are."""
    found = [member for member in members if member.name == "val/val_annotations.txt"]
    if not found:
        return None
    lines = found[0].read().decode("utf-8", "replace").splitlines()
    return {words[0]: words[1] for line in lines if len(words := line.split("\t")) >= 2}


def kaggle(members: list[Member], place: Path) -> dict[str, str] | None:
    """File name -> class of ImageNet's validation images as Kaggle gives them out, in one folder, if that is what they are.
    Raises DataError if the file that holds their classes is not there."""
    flat = [m.name for m in members if m.name.startswith("val/") and m.name.count("/") == 1 and formats.is_image(m.name)]
    if not flat or any(m.name.startswith("val/") and m.name.count("/") > 1 for m in members):
        return None
    for folder in (place, *place.absolute().parents[:3]):
        if (folder / KAGGLE).is_file():
            text = (folder / KAGGLE).read_text(encoding="utf-8", errors="replace")
            rows = csv.DictReader(io.StringIO(text))
            return {f"{row['ImageId']}.JPEG": row["PredictionString"].split()[0] for row in rows}
    raise DataError(
        f"{place}: val/ holds {len(flat)} images without folders for their classes. Those of ImageNet from Kaggle stand in "
        f"{KAGGLE}: put that file into {place} or the folder that holds ILSVRC/"
    )


def side_of(groups: dict[str, list[Image]], split: str, source: str) -> str:
    """The folder that a split is read from. Raises DataError."""
    there = [name for name in SPLITS[split] if name in groups]
    if not there:
        found = ", ".join(sorted(groups)) or "no such folder"
        raise DataError(f"{source} must be {LAYOUT}; it has images in {found}, so there are no {split} images")
    if len(there) > 1:
        print(f"note: {source}: test images are those in {there[0]}/; {', '.join(there[1:])}/ is not used", flush=True)
    return there[0]


def named(images: list[Image], classes: tuple[str, ...] | None) -> list[Image]:
    """The images with their classes' names, where folders are called by the classes' numbers."""
    numbered = {str(label): name for label, name in enumerate(classes or ())}
    if {name for name, _, _ in images} <= numbered.keys():
        return [(numbered[name], file, member) for name, file, member in images]
    return images


def refuse_copies(members: list[Member], source: str) -> None:
    name, copies = Counter(member.name for member in members).most_common(1)[0]
    if copies > 1:
        raise DataError(f"{source}: {name} occurs {copies} times: remove the archives that overlap")


def tell_what_is_left_out(members: list[Member], side: str, source: str) -> None:
    """Say how many files of a split are not read, by their endings."""
    odd = Counter(
        Path(member.name).suffix.lower() or "no ending"
        for member in members
        if member.name.startswith(f"{side}/") and not formats.is_image(member.name)
    )
    if odd:
        kinds = ", ".join(f"{ending} {count}" for ending, count in sorted(odd.items())[:5])
        print(f"note: {source}: {sum(odd.values())} files in {side}/ are no images that can be read ({kinds})", flush=True)
