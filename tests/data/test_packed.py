"""Files of other programs that hold many images: FFCV's own, written by FFCV's writer or by its format, and WebDataset
shards as webdataset's writer makes them."""

from __future__ import annotations

import io
import json
import struct

import numpy as np
import pytest
import torch
from data_files import image_set, need, png, tar_bytes, write_files
from PIL import Image

from fastrobust.config import reading
from fastrobust.data import loaders, packed, sets
from fastrobust.data.prepared import beton
from fastrobust.runtime.errors import DataError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROBUST_DATA", str(tmp_path / "absent"))
    packed._read.cache_clear()
    packed.is_shard.cache_clear()
    return tmp_path


def jpeg(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    """Smooth pictures of different sizes."""
    rng, made = np.random.default_rng(seed), []
    for k in range(count):
        small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
        made.append(np.asarray(small.resize((40 + k % 3, 36), Image.Resampling.BICUBIC)))
    return made


def ffcv_file(labels, raw=(), version=2, finished=True, names=(b"image", b"label"), extra=False, seed=0) -> bytes:
    """A file in FFCV's format, made by its description, byte by byte: header, fields, samples, one page, allocations."""
    images = pictures(len(labels), seed)
    data = [image.tobytes() if k in raw else jpeg(image) for k, image in enumerate(images)]
    fields = [(2, names[0]), *([(3, b"note")] if extra else []), (1, names[1])]
    form = "<BHHQ" if not extra else "<BHHQ3xQQ"
    size = 24 if not extra else 40
    start = 24 + len(fields) * 1041 + len(labels) * size
    page = -(-start // 4096) * 4096
    pointer, samples, allocations = page, b"", b""
    for k, (image, content, label) in enumerate(zip(images, data, labels, strict=True)):
        parts = [int(k in raw), image.shape[1], image.shape[0], pointer] + ([7, 7] if extra else [])
        sample = struct.pack(form, *parts)
        samples += sample + b"\0" * (size - 8 - len(sample)) + struct.pack("<q", label)
        allocations += struct.pack("<QQQ", k, pointer, len(content))
        pointer += len(content)
    head = struct.pack("<HHIQQ", version, len(fields), 1 << 21, len(labels), pointer if finished else 0)
    head += b"".join(struct.pack("<B16s1024s", kind, name, b"") for kind, name in fields)
    body = (head + samples).ljust(page, b"\0") + b"".join(data)
    return body + allocations


def imagenet_like(root, train=(2, 0, 11, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9), val=(11, 1, 0), **options):
    """Named as FFCV's scripts for ImageNet name them."""
    files = {"train_500_0.50_90.ffcv": ffcv_file(train, **options), "val_500_0.50_90.ffcv": ffcv_file(val, seed=1)}
    return write_files(root / "ffcv", files)


def test_the_format_is_what_ffcv_reads(root):
    """The files that these tests make are read by FFCV itself, in the same way."""
    reader = pytest.importorskip("ffcv.reader")
    for extra in (False, True):
        file = root / "a.beton"
        file.write_bytes(ffcv_file((3, 1, 2), raw=(1,), extra=extra))
        found, table = reader.Reader(str(file)), packed.ffcv_table(file)
        image, label = found.metadata["f0"], found.metadata[f"f{1 + extra}"]
        assert label.tolist() == table.label.tolist() == [3, 1, 2]
        assert image["data_ptr"].tolist() == table.offset.tolist()
        assert image["width"].tolist() == table.width.tolist() == [40, 41, 42]


def test_files_of_ffcvs_own_writer(root, capfd):
    """Written by FFCV, with some images as bare pixels; read pixel by pixel."""
    need("ffcv")
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    images, labels = pictures(12), [k % 3 for k in range(12)]

    class Data:
        def __len__(self):
            return len(images)

        def __getitem__(self, k):
            return Image.fromarray(images[k]), labels[k]

    (root / "ffcv").mkdir()
    options = {"write_mode": "proportion", "compress_probability": 0.5, "jpeg_quality": 95}
    for split in ("train", "val"):
        fields = {"image": RGBImageField(**options), "label": IntField()}
        DatasetWriter(str(root / f"ffcv/{split}_32.ffcv"), fields, num_workers=1).from_indexed_dataset(Data())
    table = packed.ffcv_table(root / "ffcv/train_32.ffcv")
    assert table.label.tolist() == labels and 0 < table.raw.sum() < 12
    found = sets.pictures("image_folder", "train", root / "ffcv")
    for i in range(12):
        k = int(found.name(i).partition(".")[0])
        assert found.labels[i] == labels[k]
        difference = np.abs(np.asarray(found.image(i)).astype(int) - images[k])
        assert difference.max() == 0 if table.raw[k] else difference.mean() < 4


def test_ffcv_files_are_a_source(root, capsys):
    """Labels are numbers in the order of numbers, not of words: 2 comes before 10."""
    place = imagenet_like(root, raw=(4,))
    found = sets.load("imagenet", "train", place, resolution=32)
    assert found.classes == tuple(map(str, range(12)))
    by_number = sorted(range(13), key=lambda k: str((2, 0, 11, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9)[k]))
    labels = [(2, 0, 11, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9)[k] for k in by_number]
    assert found.labels.tolist() == labels
    test = sets.load("imagenet", "test", place, resolution=32)
    assert sorted(test.labels.tolist()) == [0, 1, 11] and test.classes == found.classes
    out = capsys.readouterr().out
    said = f"FFCV files in {place}: 13 train images, 3 val images; labels 0 to 11, no class names: numbers"
    assert out.count(said) == 1, out
    (place / "classnames.txt").write_text("".join(f"bird {k}\n" for k in range(12)))
    named = sets.load("imagenet", "train", place, resolution=32)
    assert named.classes == tuple(f"bird {k}" for k in range(12))
    assert sorted(named.labels.tolist()) == sorted(labels)
    (place / "classnames.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"classnames.txt must have a name for each label, 0 to 11, each once: it has 2"):
        sets.load("imagenet", "train", place, resolution=32)


def test_numbers_are_never_taken_for_other_names(root):
    """A model of numbered classes is not tested on images with names; CIFAR-10's numbers have the names of CIFAR-10."""
    numbered = sets.load("imagenet", "test", imagenet_like(root), resolution=8)
    folder = write_files(root / "folder", image_set(("n01", "n02"), size=8))
    with pytest.raises(DataError, match="give images of the same classes, under the same names"):
        sets.load("imagenet", "test", folder, resolution=8).labelled_as(numbered.classes, "a run")
    labels = [9, 3, *range(10)]
    tiny = [np.full((32, 32, 3), label, np.uint8) for label in labels]
    write_files(
        root / "cifar", {"cifar_train.beton": square_file(tiny, labels), "cifar_test.beton": square_file(tiny, labels)}
    )
    found = sets.load("cifar10", "test", root / "cifar")
    assert found.classes == sets.known("cifar10").classes
    assert found.labels.tolist() == found.images[:, 0, 0, 0].tolist() and sorted(found.labels.tolist()) == sorted(labels)


def square_file(images: list[np.ndarray], labels: list[int]) -> bytes:
    """FFCV's format with bare pixels."""
    start = 24 + 2 * 1041 + 24 * len(labels)
    samples = pixels = allocations = b""
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        pointer = start + len(pixels)
        samples += struct.pack("<BHHQ3xq", 1, image.shape[1], image.shape[0], pointer, label)
        allocations += struct.pack("<QQQ", k, pointer, image.nbytes)
        pixels += image.tobytes()
    fields = struct.pack("<B16s1024s", 2, b"image", b"") + struct.pack("<B16s1024s", 1, b"label", b"")
    return struct.pack("<HHIQQ", 2, 2, 1 << 21, len(labels), start + len(pixels)) + fields + samples + pixels + allocations


DAMAGE = {
    "cut short": (lambda data: data[: len(data) // 2], "truncated"),
    "its last table cut": (lambda data: data[:-5], "its last table is not whole"),
    "without its last table": (lambda data: data[: -24 * 3], "truncated|do not fit"),
    "empty": (lambda data: b"", "is empty"),
    "a web page": (lambda data: b"<!DOCTYPE html><html></html>" * 99, "web page"),
    "a pointer changed": (lambda data: data[:2111] + b"\xff" + data[2112:], "do not fit each other"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_ffcv_files_are_refused(root, damage):
    change, message = DAMAGE[damage]
    write_files(root, {"train.ffcv": change(ffcv_file((0, 1, 2)))})
    with pytest.raises(DataError, match=message):
        sets.load("image_folder", "train", root, resolution=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 3}, "version 3 of FFCV's format, not 2"),
        ({"finished": False}, "its writer did not finish"),
        ({"labels": (0, -1)}, "label -1 of image 1 is negative"),
    ],
)
def test_odd_ffcv_files_are_refused(root, options, message):
    write_files(root, {"train.ffcv": ffcv_file(**{"labels": (0, 1)} | options)})
    with pytest.raises(DataError, match=message):
        sets.load("image_folder", "train", root, resolution=8)


def test_two_files_of_one_split_and_prepared_files_are_refused(root):
    write_files(root / "two", {name: ffcv_file((0, 1)) for name in ("train_400.ffcv", "train_500.ffcv")})
    with pytest.raises(DataError, match=r"2 FFCV files of train: train_400.ffcv, train_500.ffcv: name one"):
        sets.load("image_folder", "train", root / "two", resolution=8)
    assert len(sets.load("image_folder", "train", root / "two/train_500.ffcv", resolution=8).labels) == 2
    write_files(root / "odd", {name: ffcv_file((0, 1)) for name in ("a.ffcv", "b.ffcv")})
    with pytest.raises(DataError, match="its name must say whether it is train, test or val"):
        sets.load("image_folder", "train", root / "odd", resolution=8)
    write_files(root / "ours", {"train_160.beton": ffcv_file((0, 1)), "train_160.json": b"{}"})
    with pytest.raises(DataError, match=r"holds prepared files: set data.prepared to it"):
        sets.load("image_folder", "train", root / "ours", resolution=8)


def config_of(place, loader: str, resize=32, **data):
    return reading.parse(
        {
            "name": "packed",
            "epsilon": "4/255",
            "loader": loader,
            "data": {"dataset": "imagenet", "augment": {"crop": "random_resized", "flip": True}, "workers": 1} | data,
            "model": {"name": "resnet18"},
            "method": {"name": "fgsm"},
            "optimizer": {"name": "sgd"},
            "schedule": {"name": "cyclic", "max_lr": 0.1},
            "phases": [{"epochs": 1, "batch_size": 4, "resolution": 24, "resize": resize}],
        },
        "test",
    )


@pytest.mark.parametrize("raw", [(), (0, 4, 5)], ids=["jpeg", "mixed"])
def test_the_ffcv_loader_gives_what_the_source_gives(root, raw):
    """The same images, labels and boxes as the loader torch on the same file; decoded by FFCV's native code."""
    need("ffcv")
    place = imagenet_like(root, raw=raw)
    native = loaders.resolve(config_of(place, "ffcv", "original", prepared=str(place)), CPU)
    plain = loaders.resolve(config_of(place, "torch", "original", path=str(place)), CPU)
    ours, theirs = (loaders.Phases(config, CPU).enter(0) for config in (native, plain))
    assert ours.classes == theirs.classes and ours.labels.tolist() == theirs.labels.tolist()
    for a, b in zip(ours.batches(0, 0, 4, 0, 3), theirs.batches(0, 0, 4, 0, 3), strict=True):
        assert torch.equal(a.labels, b.labels) and torch.equal(a.index, b.index)
        assert (a.images.float() - b.images.float()).abs().mean() < 4
    test = loaders.test_set(native, None)
    assert sorted(test.labels.tolist()) == [0, 1, 11] and test.classes == ours.classes
    assert loaders.resolve(config_of(place, "auto", prepared=str(place)), CPU).loader == "ffcv"


def test_damaged_images_in_ffcv_files_are_found_before_the_training(root):
    need("ffcv")
    place = imagenet_like(root)
    file = place / "train_500_0.50_90.ffcv"
    table, content = packed.ffcv_table(file), bytearray(file.read_bytes())
    content[table.offset[3] : table.offset[3] + 200] = bytes(200)
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"image 3 of .*train_500_0.50_90.ffcv is not a usable image"):
        loaders.Phases(loaders.resolve(config_of(place, "ffcv", prepared=str(place)), CPU), CPU).enter(0)
    config = loaders.resolve(config_of(place, "ffcv", prepared=str(place), skip_corrupt=True), CPU)
    loader = loaders.Phases(config, CPU).enter(0)
    assert len(loader) == 12 and len(loader.skipped) == 1
    assert [len(batch.labels) for batch in loader.batches(0, 0, 4, 0, 3)] == [4, 4, 4]


def test_a_file_that_changes_is_read_anew(root):
    place = imagenet_like(root)
    assert len(beton.read(place, "train", 160)) == 13
    write_files(place, {"train_500_0.50_90.ffcv": ffcv_file(tuple(range(12)))})
    assert len(beton.read(place, "train", 160)) == 12


# ---- WebDataset shards


def shard(labels, first: int = 0, ending: str = "jpg", label=lambda k: {"cls": str(k).encode()}) -> bytes:
    files = {}
    for k, value in enumerate(labels, first):
        array = np.full((32, 32, 3), 20 * k % 256, np.uint8)
        files[f"{k:08}.{ending}"] = png(array) if ending == "png" else jpeg(array)
        files |= {f"{k:08}.{word}": content for word, content in label(value).items()}
    return tar_bytes(files)


JSON = lambda k: {"json": json.dumps({"label": k, "filename": f"{k}.JPEG"}).encode()}
FORMS = {
    "cls": lambda labels, first: shard(labels, first),
    "png and json": lambda labels, first: shard(labels, first, "png", JSON),
    "cls and json": lambda labels, first: shard(labels, first, label=lambda k: {"cls": b"%d" % k, "json": b"{}"}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["names", "folders"])
def test_webdataset_shards(root, form, layout, capsys):
    names = {"names": "imagenet-train-{:04}.tar", "folders": "train/{}.tar"}[layout]
    files = {names.format(k): FORMS[form](labels, 100 * k) for k, labels in enumerate([(2, 0, 11, *range(3, 10)), (1, 10)])}
    files |= {names.replace("train", "val").format(0): FORMS[form]((11, 0), 0)}
    write_files(root / "wds", files)
    found = sets.load("image_folder", "train", root / "wds", resolution=8)
    assert found.classes == tuple(map(str, range(12)))
    with_label = {
        int(name.rpartition("-")[2].partition(".")[0]): label
        for name, label in zip(found.names, found.labels.tolist(), strict=True)
    }
    assert with_label == {0: 2, 1: 0, 2: 11, 100: 1, 101: 10} | {k: k for k in range(3, 10)}
    assert len(sets.load("image_folder", "test", root / "wds", resolution=8).labels) == 2
    assert (
        f"WebDataset shards in {root}/wds: 12 train images, 2 val images; labels 0 to 11, no class"
        in capsys.readouterr().out
    )


def test_shards_with_names_and_what_is_refused(root):
    named = lambda k: {"cls": f"{k}\n".encode()}
    write_files(root, {"train-0.tar": shard(("dog", "cat", "dog"), label=named), "test-0.tar": shard(("cat",), label=named)})
    assert sets.load("image_folder", "train", root, resolution=8).classes == ("cat", "dog")
    (root / "test-0.tar").unlink()
    for bad, message in (
        (shard((1, 2)), "train has no images of 0, a class of the data set"),
        (shard((1, "cat"), label=named), "labels must be all numbers or all names"),
        (shard(("a/b", "cat"), label=named), "the class 'a/b' must not have a /"),
        (shard((0, 1)) [:3000], "truncated|end-of-archive"),
        (tar_bytes({"0.jpg": jpeg(pictures(1)[0]), "0.cls": b"1", "1.jpg": jpeg(pictures(1)[0])}), "neither .cls nor .json"),
        (tar_bytes({"0.jpg": jpeg(pictures(1)[0]), "0.json": b'{"text": "a"}'}), "its .json must have one of cls, label"),
        (tar_bytes({"0.jpg": jpeg(pictures(1)[0]), "0.cls": b"-1"}), "its label -1 is neither a number from 0 nor"),
        (tar_bytes({"0.jpg": b"", "0.png": b"", "0.cls": b"1"}), "0 in .* has 2 images"),
    ):  # fmt: skip
        write_files(root, {"train-0.tar": bad})
        with pytest.raises(DataError, match=message):
            sets.load("image_folder", "train", root, resolution=8)


def test_the_resident_loader_trains_on_shards(root):
    write_files(root, {"train-0.tar": shard([k % 3 for k in range(12)]), "val-0.tar": shard((0, 1, 2))})
    config = loaders.resolve(config_of(root, "resident", path=str(root)), CPU)
    loader = loaders.Phases(config, CPU).enter(0)
    assert len(loader) == 12 and loader.classes == ("0", "1", "2")
    assert loaders.test_set(config, None).labels.tolist() == [0, 1, 2]
