"""Which images of a folder or archive are of which split and class: the usual layouts of image data sets.

train/<class>/<image>, and test/... or val/... (valid/, validation/)   torchvision's ImageFolder
<any folder>/train/...                                                 one folder around it
Train/, training/, testing/, …                                         capitals, and these names
<class>/<image>                                                        training images; or those of the split after which
                                                                       the folder or archive is called: val.zip
val/images/<image>, val/val_annotations.txt                            Tiny-ImageNet as it is downloaded
val/<image>, LOC_val_solution.csv beside ILSVRC/                       ImageNet as Kaggle gives it out
any folders, and a CSV file with the columns file, label (and split)   `data.labels`
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastrobust.data import formats
from fastrobust.data.formats import Member
from fastrobust.runtime.errors import DataError

SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}  # folders, in the order of preference
LAYOUT = "a folder or archive (tar, zip) of train/<class>/<image> and one of test/, val/, valid/, validation/ likewise"
ALIASES = {"training": "train", "testing": "test"}
KAGGLE = "LOC_val_solution.csv"
Image = tuple[str, str, Member]  # class, file name below it, where it is


class Split(NamedTuple):
    """The images of a split sorted by (class, file name), their labels (int64) and the class names in label order."""

    members: list[Member]
    labels: np.ndarray
    classes: tuple[str, ...]


def choose(
    members: list[Member], split: str, classes: tuple[str, ...] | None, source: str, place: Path, labels: str | None = None
) -> Split:
    """One split of what `place` holds. classes: those that the data set has, if that is fixed. labels: the CSV file that
    says them, if the folders do not. Raises DataError."""
    files, groups = grouped(members, place, labels)
    side = side_of(members, groups, split, source, labels)
    images = named(groups[side], classes)
    found = {name for name, _, _ in images}
    train = {name for name, _, _ in named(groups.get("train", []), classes)}
    expected = set(classes or train or found)
    if found - expected or (split == "train" and found != expected):
        if not (more := found - expected):
            raise DataError(f"{source}: train has no images of {first_five(expected - found)}, a class of the data set")
        same = first_five(name for name in expected if name.lower() in {other.lower() for other in more})
        said = f"{split} has images of {first_five(more)}, which is no class of {'the data set' if classes else 'train'}"
        said += f" ({same} is: capitals count)" if same else ""
        raise DataError(f"{source}: {said}: give classes the same names in all splits, or take these images away")
    if absent := sorted(expected - found):
        tell(f"note: {source} has no {split} images of {', '.join(absent[:5])}: accuracies leave them out")
    if len(expected) < 2 and labels:
        raise DataError(f"{labels}: all images are of one class, '{min(found)}': at least two are needed")
    if len(expected) < 2:
        raise DataError(
            f"{source}: all images of {side}/ are of one class, '{min(found)}'. Is the path one level too high? "
            f"It must be {LAYOUT}"
        )
    refuse_copies(files, source)
    if not labels:
        refuse_shared_folders(images, source)
        tell_what_is_left_out(files, side, source)
        doubt_nested(images, source)
    index = {name: label for label, name in enumerate(classes or sorted(expected))}
    chosen = sorted(images)
    return Split([member for _, _, member in chosen], np.array([index[name] for name, _, _ in chosen]), tuple(index))


def grouped(members: list[Member], place: Path, labels: str | None) -> tuple[list[Member], dict[str, list[Image]]]:
    """The files that are not hidden, by their names below the folder around all; and the images of each split."""
    members = split_named([member for member in without_top_folder(members) if not is_hidden(member.name)], place)
    if labels:
        return members, by_file(members, place, labels)
    images = [member.name for member in members if formats.is_image(member.name)]
    if len({top(name) for name in images}) > 1 and all(name.count("/") == 1 for name in images):
        members = below(members, place, "train")
    return members, by_folder(members, place)


def top(name: str) -> str:
    return name.partition("/")[0]


def split_folder(name: str) -> str | None:
    """The name of a split that a folder's name is, in capitals too; None if it is none."""
    name = ALIASES.get(name.lower(), name.lower())
    return name if any(name in names for names in SPLITS.values()) else None


def below(members: list[Member], place: Path, side: str | None = None) -> list[Member]:
    """Files that are in no split's folder, as if in one: that after which `place` is called (val.zip), or else in `side`."""
    side = split_folder(place.name.partition(".")[0]) or side
    inner = without_top_folder(members)
    if side is None or any(split_folder(top(member.name)) for member in inner):
        return members
    return [m._replace(name=f"{side}/{m.name}") if "/" in m.name else m for m in inner]


def split_named(members: list[Member], place: Path) -> list[Member]:
    """The members with their splits' folders called as in `SPLITS`. Raises DataError if that is not clear."""
    tops = sorted({top(member.name) for member in members if "/" in member.name})
    names = {folder: name for folder in tops if (name := split_folder(folder)) not in (None, folder)}
    for folder, name in list(names.items()):
        if name in tops:
            tell(f"note: {place}: {name}/ is used, {folder}/ is not")
            del names[folder]
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        both = " and ".join(f"{folder}/" for folder in names if names[folder] == twice[0])
        raise DataError(f"{place} holds {both}, both for {twice[0]}: remove or rename one")
    return [m._replace(name=names[top(m.name)] + m.name[len(top(m.name)) :]) if top(m.name) in names else m for m in members]


def side_name(folder: str) -> str:
    """The split that a folder of this name holds."""
    return next((side for side, names in SPLITS.items() if folder in names), folder)


def find_labels(labels: str, path: str | Path | None) -> Path:
    """The CSV file of `data.labels`: as it is named, or in the data set's folder. Raises DataError."""
    places = [Path(labels), *([Path(path) / labels, Path(path).parent / labels] if path is not None else [])]
    for place in places:
        if place.is_file():
            return place
    raise DataError(f"data.labels: there is no file {' nor '.join(map(str, places[:2]))}")


def by_file(members: list[Member], place: Path, labels: str) -> dict[str, list[Image]]:
    """The images of each split as a CSV file gives them. Files are named from the data set's folder, or from the folder of
    their split. Without a column `split` a file in train/, test/, … is of that split, and any other of train."""
    csv_file, images = find_labels(labels, place), {m.name: m for m in members if formats.is_image(m.name)}
    rows = table(csv_file)
    sides = {name: side for side, names in SPLITS.items() for name in names}
    groups: dict[str, list[Image]] = {}
    missing, used = [], {}
    for number, row in enumerate(rows, 2):
        name, label, side = ((row.get(key) or "").strip() for key in ("file", "label", "split"))
        side = split_folder(side) or side
        if any(row.get(None) or ()):  # more than there are columns
            raise DataError(f"{csv_file}, line {number}, has more fields than the first line: put names with ',' in quotes")
        if not name or not label or (side and side not in sides):
            odd = f"the split '{side}', which is none of {', '.join(sides)}" if name and label else "no file or no label"
            raise DataError(f"{csv_file}, line {number}, has {odd}")
        name = Path(name if name in images else name.replace("\\", "/")).as_posix()
        usual = name if name in images else (split_folder(top(name)) or top(name)) + name[len(top(name)) :]
        found = [
            known for known in (usual, *(f"{folder}/{name}" for folder in ([side] if side else sides))) if known in images
        ]
        if not found:
            missing.append(name)
            continue
        if len(found) > 1 or used.setdefault(found[0], number) != number:
            twice = f"means {' and '.join(found)}" if len(found) > 1 else f"is in line {used[found[0]]} too"
            raise DataError(f"{csv_file}, line {number}: {name} {twice}: name every file once, from the data set's folder")
        folder = side or found[0].partition("/")[0]
        groups.setdefault(folder if folder in sides else "train", []).append((label, found[0], images[found[0]]))
    if missing:
        raise DataError(f"{csv_file} names {len(missing)} files that are not in {place}:\n{formats.first_ten(missing)}")
    if len(used) < len(images):
        tell(f"note: {place}: {len(images) - len(used)} images are not in {csv_file}, and not used")
    return groups


def table(file: Path) -> list[dict]:
    """The lines of a CSV file as spreadsheets write them: with , ; or tabs, any capitals in the names of the columns, and
    perhaps a first line that says the separator. Raises DataError."""
    first, _, rest = (text := formats.read_text(file)).partition("\n")
    if first.strip().lower() in ("sep=,", "sep=;"):
        first, text = rest.partition("\n")[0], rest
    if "\0" in text:
        raise DataError(f"{file} is no text in UTF-8, nor in UTF-16 with a byte order mark: save it as CSV UTF-8")
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
        columns = rows.fieldnames = [column.strip().lower() for column in rows.fieldnames or []]
        if not {"file", "label"} <= set(columns) <= {"file", "label", "split", ""}:
            needed = "it needs the columns file, label and may have a column split, separated by , ; or tab"
            raise DataError(f"{file} has the columns {', '.join(columns) or '(none)'}: {needed}")
        return list(rows)
    except csv.Error as error:
        raise DataError(f"{file} cannot be read: {error}") from None


def without_top_folder(members: list[Member]) -> list[Member]:
    """The members by their names below the one folder that all files are in, if that folder is not a split."""
    files = [member.name for member in members if not is_hidden(member.name) and not member.name.endswith("/")]
    tops = {top(name) for name in files}
    if len(tops) != 1 or any(map(split_folder, tops)) or not all("/" in name for name in files):
        return members
    inner = [(member, member.name.partition("/")[2]) for member in members]
    kept = [member._replace(name=name) for member, name in inner if name and not is_hidden(member.name)]
    return without_top_folder(kept)


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder around it, is one that programs leave behind: .DS_Store, .ipynb_checkpoints, __MACOSX."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def shown(place: Path) -> list[Path]:
    """What a folder holds and is not hidden."""
    return [child for child in place.iterdir() if not is_hidden(child.name)]


def has_splits(place: Path) -> bool:
    """Whether a folder holds the folder of a split, itself or in the one folder that is in it."""
    inside = [child for child in shown(place) if child.is_dir()]
    return any(split_folder(child.name) for child in inside) or (len(inside) == 1 and has_splits(inside[0]))


def has_classes(place: Path) -> bool:
    """Whether a folder holds folders of images, itself or in the one folder that is in it."""
    inside = [child for child in shown(place) if child.is_dir()]
    filled = [child for child in inside if any(formats.is_image(file.name) for file in child.iterdir())]
    return len(filled) > 1 or (len(inside) == 1 and has_classes(inside[0]))


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
        images = [m for m in members if m.name.startswith("val/") and formats.is_image(m.name)]
        files = [member.name.rpartition("/")[2] for member in images]
        if unknown := [file for file in files if file not in flat]:
            told = f"the file of classes names {len(flat)}, but not {len(unknown)} of them, such as {unknown[0]}"
            raise DataError(f"{place}: val/ holds {len(images)} images; {told}: fetch the data set again")
        groups["val"] = [(flat[file], file, member) for file, member in zip(files, images, strict=True)]
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


def side_of(
    members: list[Member], groups: dict[str, list[Image]], split: str, source: str, labels: str | None = None
) -> str:
    """The folder that a split is read from. Raises DataError."""
    there = [name for name in SPLITS[split] if name in groups]
    if not there:
        hold = f"; {test_images_elsewhere(Path(source))}" if "train" in groups else ""
        if labels:
            raise DataError(f"{labels} has images of {', '.join(sorted(groups))}, so there are no {split} images{hold}")
        tops = {top(member.name) for member in without_top_folder(members) if not is_hidden(member.name)}
        sides = sorted(filter(split_folder, groups))
        found = f"it has images in {', '.join(sides)}" if sides else f"it holds {first_five(tops)}, images in no such folder"
        if sides and not any(map(split_folder, tops)):
            classes = first_five({name for images in groups.values() for name, _, _ in images})
            found = f"its folders {classes} are taken for classes of {sides[0]}/"
        raise DataError(f"{source} must be {LAYOUT}; {found}, so there are no {split} images{hold}")
    if len(there) > 1:
        tell(f"note: {source}: test images are those in {there[0]}/; {', '.join(there[1:])}/ is not used")
    return there[0]


def test_images_elsewhere(place: Path) -> str:
    """What to do where a place has training images alone, in words that fit a training and an evaluation."""
    beside = any((place.parent / name).is_dir() for name in SPLITS["test"])
    found = f"{place.parent}, which has test images too" if beside else "a place with test/<class>/<image> too"
    return f"give {found}. A run can be trained without test images: data.held_out=N sets training images apart"


def first_five(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")


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


def refuse_shared_folders(images: list[Image], source: str) -> None:
    """Two classes must not be links to one folder: its images would have two labels. Raises DataError."""
    seen: dict[str, tuple[str, str]] = {}
    folders = {member.name.rpartition("/")[0]: (name, member) for name, _, member in images}
    for folder, (name, member) in sorted(folders.items()):
        real = formats.folder_of(member)
        first, label = seen.setdefault(real or folder, (folder, name))
        if label != name:
            raise DataError(f"{source}: {first} and {folder} are one folder, {real}: it is of two classes, remove one")


_told: set[str] = set()


def tell(note: str) -> None:
    """Print a note about a folder, once: a run looks into its folders several times."""
    if (key := note.replace(f"{Path.cwd()}/", "")) not in _told:  # a run's path is absolute, a command's may not be
        _told.add(key)
        print(note, flush=True)


def tell_again() -> None:
    """From here on notes that were printed before are printed again: another run begins."""
    _told.clear()


def tell_what_is_left_out(members: list[Member], side: str, source: str) -> None:
    """Say how many files of a split are not read, by their endings, and which folders of it are no classes."""
    inside = [member.name for member in members if member.name.startswith(f"{side}/")]
    files = [name for name in inside if not name.endswith("/")]
    odd = Counter(Path(name).suffix.lower() or "no ending" for name in files if not formats.is_image(name))
    if odd:
        kinds = ", ".join(f"{ending} {count}" for ending, count in sorted(odd.items())[:5])
        tell(f"note: {source}: {sum(odd.values())} files in {side}/ are no images that can be read ({kinds})")
    folders, filled = (
        {name.split("/")[1] for name in names if name.count("/") > 1} for names in (inside, filter(formats.is_image, inside))
    )
    if empty := folders - filled:
        told = f"folders of {side}/ without an image that can be read are no classes: {first_five(empty)}"
        tell(f"note: {source}: {told}")


def doubt_nested(images: list[Image], source: str) -> None:
    """Say it where no class has an image of its own, and some have several folders of them: the classes may lie deeper."""
    if all("/" in file for _, file, _ in images):
        inner = {(name, file.partition("/")[0]) for name, file, _ in images}
        classes, folders = (sorted(set(part)) for part in zip(*inner, strict=True))
        if len(inner) > len(classes):
            told = f"the classes {', '.join(classes[:5])} hold their images in folders ({', '.join(folders[:5])})"
            tell(f"note: {source}: {told}: if these are the classes, they must be one level higher")
