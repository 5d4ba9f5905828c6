"""Tests of fastrobust.data.layouts: what is on disk, in the layouts in which image data sets are given out."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastrobust.data import formats, layouts, sets
from fastrobust.data.held_out import Choice
from fastrobust.runtime.errors import DataError


def png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), colour, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(root: Path, *names: str) -> Path:
    for k, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(10 * k))
    return root


def read(root: Path, split: str, dataset: str = "image_folder"):
    """(colours, class names of the images) of a split."""
    found = sets.load(dataset, split, root, resolution=8)
    return (found.images[:, 0, 0, 0] // 10).tolist(), [found.classes[label] for label in found.labels]


PLAIN = ("train/cat/1.png", "train/dog/2.png")


def test_valid_is_a_name_for_test(tmp_path):
    root = write(tmp_path, *PLAIN, "valid/cat/3.png", "valid/dog/4.png")
    assert read(root, "train") == ([0, 1], ["cat", "dog"]) and read(root, "test") == ([2, 3], ["cat", "dog"])


def test_of_val_and_test_the_test_images_count(tmp_path, capsys):
    root = write(tmp_path, *PLAIN, "val/cat/3.png", "val/dog/4.png", "test/cat/5.png", "test/dog/6.png")
    assert read(root, "test") == ([4, 5], ["cat", "dog"])
    assert "test images are those in test/; val/ is not used" in capsys.readouterr().out


def test_a_folder_around_all(tmp_path):
    write(tmp_path / "download" / "pets", *PLAIN, "test/cat/3.png", "test/dog/4.png")
    assert read(tmp_path, "test") == ([2, 3], ["cat", "dog"])


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.bz2"])
def test_archives_with_a_folder_around_all(tmp_path, kind):
    root, file = write(tmp_path / "pets", *PLAIN, "test/cat/3.png", "test/dog/4.png"), tmp_path / f"pets.{kind}"
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            for path in files:
                archive.write(path, path.relative_to(tmp_path))
    else:
        with tarfile.open(file, f"w:{kind.partition('.')[2]}") as archive:
            for path in files:
                archive.add(path, path.relative_to(tmp_path))
    assert read(file, "train") == ([0, 1], ["cat", "dog"]) and read(file, "test") == ([2, 3], ["cat", "dog"])


def test_a_test_set_alone(tmp_path):
    root = write(tmp_path, "test/cat/1.png", "test/dog/2.png")
    assert read(root, "test") == ([0, 1], ["cat", "dog"])
    with pytest.raises(DataError, match="it has images in test, so there are no train images"):
        read(root, "train")


def test_a_test_set_of_some_classes(tmp_path, capsys, monkeypatch):
    root = write(tmp_path, *PLAIN, "train/owl/3.png", "test/owl/4.png", "test/cat/5.png")
    assert read(root, "test") == ([4, 3], ["cat", "owl"])
    assert sets.load("image_folder", "test", root, resolution=8).classes == ("cat", "dog", "owl")
    assert "has no test images of dog" in capsys.readouterr().out
    layouts.tell_again()
    monkeypatch.chdir(root.parent)
    for path in (Path(root.name), root):
        sets.list_images("image_folder", "test", path)
    assert capsys.readouterr().out.count("has no test images of dog") == 1


def test_tiny_imagenet_as_it_is_downloaded(tmp_path):
    names = ("train/n1/images/n1_0.png", "train/n2/images/n2_0.png", "val/images/val_0.png", "val/images/val_1.png")
    root = write(tmp_path, *names, "test/images/test_0.png")
    (root / "val/val_annotations.txt").write_text("val_0.png\tn2\t0\t0\t9\t9\nval_1.png\tn1\t0\t0\t9\t9\n")
    assert read(root, "train") == ([0, 1], ["n1", "n2"]) and read(root, "test") == ([3, 2], ["n1", "n2"])


def test_imagenet_as_kaggle_gives_it_out(tmp_path):
    inner = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    names = ("train/n1/n1_0.JPEG", "train/n2/n2_0.JPEG", "val/ILSVRC2012_val_1.JPEG", "val/ILSVRC2012_val_2.JPEG")
    write(inner, *names, "test/ILSVRC2012_test_1.JPEG")
    with pytest.raises(DataError, match="LOC_val_solution"):
        read(inner, "test")
    rows = "ImageId,PredictionString\nILSVRC2012_val_1,n2 1 2 3 4\nILSVRC2012_val_2,n1 1 2 3 4 n1 5 6 7 8\n"
    (tmp_path / "LOC_val_solution.csv").write_text(rows)
    assert read(inner, "test") == ([3, 2], ["n1", "n2"]) and read(inner, "train") == ([0, 1], ["n1", "n2"])


def test_cifar10_in_folders_called_by_number(tmp_path):
    names = [f"{split}/{label}/{label}.png" for split in ("train", "test") for label in range(10)]
    for k, name in enumerate(names):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), k, np.uint8)).save(file)
    found = sets.load("cifar10", "train", tmp_path)
    assert found.classes[found.labels[found.images[:, 0, 0, 0].tolist().index(3)]] == "cat"


def test_one_class_is_refused(tmp_path):
    root = write(tmp_path, "train/images/cat/1.png", "train/images/dog/2.png", "test/images/cat/3.png")
    with pytest.raises(DataError, match=r"one class, 'images'\. Is the path one level too high"):
        read(root, "train")


def test_hidden_files_are_left_alone_and_others_are_said(tmp_path, capsys):
    hidden = ("train/.ipynb_checkpoints/5.png", "__MACOSX/train/cat/._1.png", "train/cat/.DS_Store.png")
    root = write(tmp_path, *PLAIN, "test/cat/3.png", "test/dog/4.png", *hidden)
    (root / "train/cat/notes.txt").write_text("x")
    (root / "train/dog/9.heic").write_text("x")
    assert read(root, "train") == ([0, 1], ["cat", "dog"])
    assert "2 files in train/ are no images that can be read (.heic 1, .txt 1)" in capsys.readouterr().out


def test_links_that_lead_in_a_circle(tmp_path):
    root = write(tmp_path, *PLAIN, "test/cat/3.png", "test/dog/4.png")
    os.symlink(root / "train", root / "train" / "cat" / "again")
    assert read(root, "train") == ([0, 1], ["cat", "dog"])


def test_endings_of_jpegs(tmp_path):
    assert all(map(formats.is_image, ("a.jfif", "a.JPE", "a.jpeg"))) and not formats.is_image("a.heic")


def test_what_is_no_image_is_called_what_it_is(tmp_path):
    root = write(tmp_path, *PLAIN, "test/cat/3.png", "test/dog/4.png")
    bad = root / "train/cat/1.png"
    for content, words in (
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (png(3)[:40], "is not a usable image"),
    ):
        bad.write_bytes(content)
        with pytest.raises(DataError, match=words):
            read(root, "train")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied"), r"1\.png cannot be read \(Permission denied\)"),
        (OSError(5, "Input/output error"), r"1\.png cannot be read \(Input/output error\)"),
    ],
)
def test_what_the_system_refuses_is_not_called_damaged(tmp_path, monkeypatch, error, words):
    """Nobody should delete good images for a message about them."""
    root = write(tmp_path, *PLAIN, "test/cat/3.png", "test/dog/4.png")

    def fail(file, *arguments):
        if Path(file).name == "1.png":
            error.filename = str(file)
            raise error
        return read_at(file, *arguments)

    read_at = formats.read_at
    monkeypatch.setattr(formats, "read_at", fail)
    with pytest.raises(DataError, match=words) as caught:
        read(root, "train")
    assert not any(word in str(caught.value) for word in ("replace", "remove", "corrupt", "damage", "fetch"))


def test_a_lack_of_memory_is_no_fault_of_the_image(tmp_path, monkeypatch):
    root = write(tmp_path, *PLAIN, "test/cat/3.png", "test/dog/4.png")
    monkeypatch.setattr(formats.Image, "open", lambda *a, **k: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        read(root, "train")


def test_all_bad_files_are_named(tmp_path):
    root = write(tmp_path, *PLAIN, "test/cat/3.png", "test/dog/4.png")
    for name in PLAIN:
        (root / name).write_bytes(b"bad")
    with pytest.raises(DataError) as caught:
        read(root, "train")
    assert all(name in str(caught.value) for name in PLAIN)


def test_an_odd_exif_block_does_not_spoil_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(formats.ImageOps, "exif_transpose", lambda *a, **k: (_ for _ in ()).throw(ValueError("odd")))
    root = write(tmp_path, *PLAIN, "test/cat/3.png", "test/dog/4.png")
    assert read(root, "train") == ([0, 1], ["cat", "dog"])


def test_names_that_are_not_utf8(tmp_path):
    folder = os.fsencode(tmp_path / "train") + b"/caf\xe9"
    os.makedirs(folder)
    with open(folder + b"/\xff.png", "wb") as file:
        file.write(png(50))
    root = write(tmp_path, "train/dog/1.png", "test/dog/2.png")
    found = sets.load("image_folder", "train", root, resolution=8)
    assert found.classes == ("caf\\xe9", "dog") and len(found.checksum()) == 64
    assert layouts.is_hidden("a/.b/c.png") and not layouts.is_hidden("a/b/c.png")


def test_a_class_folder_without_images_is_named(tmp_path, capsys):
    root = write(tmp_path, *PLAIN, "test/cat/3.png", "test/dog/4.png", "train/owl/5.heic")
    (root / "train/bee").mkdir()
    assert read(root, "train") == ([0, 1], ["cat", "dog"])
    told = capsys.readouterr().out
    assert "(.heic 1)" in told and "folders of train/ without an image that can be read are no classes: bee, owl" in told
    assert read(root, "test")[1] == ["cat", "dog"] and "no classes" not in capsys.readouterr().out


def test_a_hidden_folder_beside_the_one_around_all(tmp_path):
    write(tmp_path, *(f"pets/{name}" for name in PLAIN), ".cache/train/cat/1.png")
    (tmp_path / ".cache" / "empty").mkdir()
    assert read(tmp_path, "train") == ([0, 1], ["cat", "dog"])


def test_classes_that_hold_folders_alone_are_doubted(tmp_path, capsys):
    years = [f"train/{year}/{name}/{year}{name}.png" for year in (2023, 2024) for name in ("cat", "dog")]
    root = write(tmp_path, *years, "test/2023/cat/1.png")
    assert read(root, "train")[1] == ["2023", "2023", "2024", "2024"]
    assert "classes 2023, 2024 hold their images in folders (cat, dog): if these are the" in capsys.readouterr().out
    write(tmp_path, "train/2023/1.png")
    read(root, "train")
    assert "if these are" not in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["train/cat2", "train/owl/more"])
def test_one_folder_is_not_two_classes(tmp_path, folder):
    root = write(tmp_path, *PLAIN, "train/owl/5.png", "test/cat/3.png")
    os.symlink(root / "train" / "cat", root / folder)
    os.symlink(root / "test", root / "val")  # the same split twice is told by a note
    with pytest.raises(DataError, match=f"train/cat and {folder} are one folder, .*train/cat: it is of two classes"):
        read(root, "train")
    assert read(root, "test")[1] == ["cat"]


@pytest.mark.parametrize(
    ("train", "test"), [("Train", "Val"), ("TRAIN", "TEST"), ("training", "testing"), ("Training", "Valid")]
)
@pytest.mark.parametrize("around", ["", "pets/"])
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_names_of_splits_in_capitals_and_training_testing(tmp_path, train, test, around, kind):
    names = [
        f"{around}{train}/cat/1.png",
        f"{around}{train}/dog/2.png",
        f"{around}{test}/cat/3.png",
        f"{around}{test}/dog/4.png",
    ]
    root = write(tmp_path / "set", *names)
    if kind == "tar":
        with tarfile.open(tmp_path / "set.tar", "w") as archive:
            archive.add(root, ".")
        root = tmp_path / "set.tar"
    assert read(root, "train") == ([0, 1], ["cat", "dog"]) and read(root, "test") == ([2, 3], ["cat", "dog"])
    assert sets.has_test_images("image_folder", root)


def test_two_folders_for_one_split(tmp_path, capsys):
    root = write(tmp_path, *PLAIN, "Train/cat/3.png", "test/cat/4.png")
    assert read(root, "train") == ([0, 1], ["cat", "dog"])  # the name as it is documented counts
    assert "note: " in capsys.readouterr().out
    os.rename(root / "train", root / "training")
    with pytest.raises(DataError, match="holds Train/ and training/, both for train: remove or rename one"):
        read(root, "train")


def test_a_folder_of_classes_without_splits(tmp_path):
    names = [f"{name}/{k}.png" for name in ("cat", "dog") for k in range(6)]
    root = write(tmp_path / "pets", *names, "notes.txt")
    assert read(root, "train")[1] == ["cat"] * 6 + ["dog"] * 6 and not sets.has_test_images("image_folder", root)
    held = sets.load("image_folder", "held_out", root, resolution=8, choice=Choice(held_out=4))
    rest = sets.load("image_folder", "train", root, resolution=8, choice=Choice(held_out=4))
    assert len(held.labels) == 4 and len(rest.labels) == 8 and not set(held.names) & set(rest.names)
    told = r"its folders cat, dog are taken for classes of train/, so there are no test images; give a place"
    with pytest.raises(DataError, match=told):
        read(root, "test")
    os.rename(root, tmp_path / "val")
    assert read(tmp_path / "val", "test")[1] == ["cat"] * 6 + ["dog"] * 6  # its own name says the split
    with pytest.raises(DataError, match="taken for classes of val/, so there are no train images"):
        read(tmp_path / "val", "train")
    write(tmp_path / "val", "dog/more/9.png")  # which level the classes are is not clear
    with pytest.raises(DataError, match=r"it holds cat, dog, notes\.txt, images in no such folder"):
        read(tmp_path / "val", "test")


def zipped(file: Path, *names: str) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for k, name in enumerate(names):
            archive.writestr(name, png(10 * k))
    return file


@pytest.mark.parametrize("around", ["", "images/"])
def test_an_archive_for_each_split(tmp_path, around):
    zipped(tmp_path / "train.zip", f"{around}cat/1.png", f"{around}dog/2.png")
    zipped(tmp_path / "Val.zip", f"{around}cat/1.png", f"{around}dog/2.png", f"{around}dog/3.png")
    assert read(tmp_path, "train") == ([0, 1], ["cat", "dog"]) and read(tmp_path, "test") == (
        [0, 1, 2],
        ["cat", "dog", "dog"],
    )
    assert read(tmp_path / "Val.zip", "test")[0] == [0, 1, 2]


def test_a_zip_archive_with_the_separators_of_windows(tmp_path):
    file = zipped(
        tmp_path / "pets.zip", "pets\\", "pets\\train\\cat\\1.png", "pets\\train\\dog\\2.png", "pets\\val\\dog\\3.png"
    )
    assert b"pets\\train\\cat\\1.png" in file.read_bytes()
    assert read(file, "train") == ([1, 2], ["cat", "dog"]) and read(file, "test") == ([3], ["dog"])


def test_a_refusal_says_what_is_there(tmp_path):
    root = write(tmp_path, "images/a/b/1.png", "other/2.png", "x.7z", ".hidden/3.png")
    with pytest.raises(DataError, match=r"nor a file \*\.tar, .*; it holds images/, other/, x\.7z\n"):
        read(root, "train")
    file = zipped(tmp_path / "pets.zip", "images/a/b/1.png", "other/2.png")
    with pytest.raises(DataError, match="it holds images, other, images in no such folder, so there are no train"):
        read(file, "train")


def test_a_note_is_printed_once_for_a_run(tmp_path, capsys):
    root = write(tmp_path, *PLAIN, "train/cat/notes.heic", "test/cat/3.png", "test/dog/4.png")
    for _ in range(3):
        read(root, "train")
    assert capsys.readouterr().out.count("1 files in train/ are no images") == 1
    layouts.tell_again()
    read(root, "train")
    assert capsys.readouterr().out.count("1 files in train/ are no images") == 1
