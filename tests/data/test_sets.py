"""Tests of fastrobust.data.sources: idx files, finding and downloading, CIFAR-10 batches. For images: test_image_sets.py."""

import codecs
import gzip
import hashlib
import os
import pickle
import struct
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
from data_files import (
    CIFAR,
    RNG,
    check_form,
    cifar_batches,
    idx,
    idx_folder,
    pixels_of,
    real,
    tar_bytes,
    write_files,
)

from fastrobust.config.datasets import DATASETS
from fastrobust.data import formats, sets
from fastrobust.data.sets import load, locate, read_idx_pair
from fastrobust.models.torchvision_compat import import_torchvision
from fastrobust.runtime import machine
from fastrobust.runtime.errors import DataError

pytestmark = pytest.mark.filterwarnings("error")  # a warning from numpy, torch or Pillow is a defect here


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty data root, with the system-wide Fashion-MNIST out of sight."""
    monkeypatch.setenv("FASTROBUST_DATA", str(tmp_path))
    monkeypatch.setitem(sets._PLACES, "fashion_mnist", ["fashion_mnist", "FashionMNIST/raw"])
    return tmp_path


# ---- idx


def test_idx_pair_plain_and_gzipped(tmp_path):
    images, labels = idx_folder(tmp_path)
    read = read_idx_pair(*(tmp_path / f"{name}.gz" for name in sets._IDX_NAMES["train"]), 10)
    np.testing.assert_array_equal(read[0], images)
    np.testing.assert_array_equal(read[1], labels)
    read = read_idx_pair(*(tmp_path / name for name in sets._IDX_NAMES["test"]), 10)
    np.testing.assert_array_equal(read[0], images[:10])
    np.testing.assert_array_equal(read[1], labels[:10])


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist"])
def test_idx_load_and_limit(root, monkeypatch, dataset):
    images, labels = idx_folder(root / dataset)
    digests = [hashlib.md5(idx(array)).hexdigest() for array in (images, labels)]
    monkeypatch.setitem(sets._IDX_MD5, (dataset, "train"), digests)
    result = load(dataset, "train")
    check_form(result, 20, 1, 28, DATASETS[dataset].classes)
    np.testing.assert_array_equal(result.images[:, 0].numpy(), images)
    assert result.labels.tolist() == labels.tolist()
    for name in sets._IDX_NAMES["train"]:
        assert str(root / dataset / name) in result.source
    part = load(dataset, "train", limit=4)
    np.testing.assert_array_equal(part.images[:, 0].numpy(), images[[0, 5, 10, 15]])
    assert part.labels.tolist() == [0, 5, 0, 5]
    assert len(load(dataset, "train", limit=99).labels) == 20


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist"])
def test_idx_with_other_content_fails_the_checksum(root, dataset):
    idx_folder(root / dataset)
    with pytest.raises(DataError, match=r"train-images.*checksum"):
        load(dataset, "train")


IMAGES = idx(np.zeros((10, 28, 28), np.uint8))
LABELS = idx(np.arange(10, dtype=np.uint8))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES[:-1], LABELS, "images.* is truncated"),
        (IMAGES[:10], LABELS, "images.* is truncated"),
        (b"", LABELS, "images.* is truncated"),
        (gzip.compress(IMAGES)[:-12], LABELS, "images.* is truncated"),
        (gzip.compress(IMAGES)[:-2], LABELS, "images.* is truncated"),
        (gzip.compress(IMAGES[:-1]), LABELS, "images.* is truncated"),
        (IMAGES + b"\0", LABELS, "images.* more follow"),
        (gzip.compress(IMAGES) + b"trailing", LABELS, "images.* corrupt"),
        (gzip.compress(IMAGES)[:-8] + bytes(8), LABELS, "images.* corrupt"),
        (gzip.compress(IMAGES)[:12] + b"\xff" * 40, LABELS, "images.* corrupt"),
        (LABELS, LABELS, "images.*(no idx|truncated)"),
        (IMAGES, IMAGES, "labels.*no idx"),
        (idx(np.zeros((10, 27, 28), np.uint8)), LABELS, r"images.*\(10, 27, 28\)"),
        (idx(np.zeros((0, 28, 28), np.uint8)), LABELS, r"images.*\(0, 28, 28\)"),
        (IMAGES, LABELS[:-1], "labels.* is truncated"),
        (IMAGES, idx(np.arange(9, dtype=np.uint8)), "images.*labels.*10 images and 9 labels"),
        (IMAGES, LABELS[:-1] + b"\x0a", r"labels.*label 10 of image 9 is outside 0\.\.9"),
    ],
)
def test_damaged_idx(tmp_path, images, labels, message):
    (tmp_path / "images").write_bytes(images)
    (tmp_path / "labels").write_bytes(labels)
    with pytest.raises(DataError, match=message) as caught:
        read_idx_pair(tmp_path / "images", tmp_path / "labels", 10)
    assert "fetch" in str(caught.value) and "checksum" not in str(caught.value)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_hostile_idx_header_allocates_nothing(tmp_path, pack):
    (tmp_path / "images").write_bytes(pack(struct.pack(">4I", 0x803, 2**31, 28, 28) + bytes(784)))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="2147483648"):
            read_idx_pair(tmp_path / "images", tmp_path / "labels", 10)
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


def test_idx_larger_than_the_memory(tmp_path, monkeypatch):
    (tmp_path / "images").write_bytes(IMAGES)
    (tmp_path / "meminfo").write_text("MemAvailable: 9 kB\n")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    with pytest.raises(DataError, match=r"images needs 7\.84e-06 GB of memory"):
        read_idx_pair(tmp_path / "images", tmp_path / "labels", 10)


def test_truncated_download_is_called_truncated_in_load(root):
    idx_folder(root / "mnist")
    file = root / "mnist" / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is truncated"):
        load("mnist", "train")


@pytest.mark.parametrize(
    ("split", "count", "digest"),
    [
        ("train", 60000, "6bbc9ace898e44ae57da46a324031adb"),
        ("test", 10000, "2646ac647ad5339dbf082846283269ea"),
    ],
)
def test_real_mnist(split, count, digest):
    real("mnist")
    result = load("mnist", split)
    check_form(result, count, 1, 28, "0123456789")
    assert hashlib.md5(idx(result.images[:, 0].numpy())).hexdigest() == digest
    if split == "train":
        assert result.labels.bincount().tolist() == [
            5923,
            6742,
            5958,
            6131,
            5842,
            5421,
            5918,
            6265,
            5851,
            5949,
        ]
        assert result.labels[:5].tolist() == [5, 0, 4, 1, 9]


def test_real_fashion_mnist():
    if not Path(sets._DEBIAN_FASHION).exists():
        pytest.skip("needs the package dataset-fashion-mnist")
    result = load("fashion_mnist", "test", sets._DEBIAN_FASHION)
    check_form(result, 10000, 1, 28, DATASETS["fashion_mnist"].classes)
    assert result.labels.bincount().tolist() == [1000] * 10
    assert result.labels[0] == 9  # an ankle boot


# ---- finding and downloading


@pytest.mark.parametrize("folder", ["mnist", "MNIST/raw", "."])
def test_locate_mnist(root, folder):
    idx_folder(root / folder)
    assert locate("mnist") == root / folder
    assert locate("mnist", root / folder) == root / folder
    for name in ("train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte"):
        (root / folder / name).unlink()
    with pytest.raises(DataError, match="lacks train-labels-idx1-ubyte, t10k-images-idx3-ubyte"):
        locate("mnist")


def test_default_root_is_data_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTROBUST_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    idx_folder(tmp_path / "data" / "mnist")
    assert locate("mnist") == Path("data/mnist")


def test_locate_prefers_the_original_cifar10(root):
    write_files(root / "cifar10-jpeg", {"set.tar.xz": b""})
    assert locate("cifar10") == root / "cifar10-jpeg"
    write_files(root / "cifar10", {"train/cat/1.png": b""})
    assert locate("cifar10") == root / "cifar10"
    write_files(root, {"cifar-10-python.tar.gz": b""})
    assert locate("cifar10") == root / "cifar-10-python.tar.gz"
    write_files(root / "cifar-10-batches-py", cifar_batches(1)[0])
    assert locate("cifar10") == locate("cifar10", root) == root / "cifar-10-batches-py"
    (root / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(DataError, match="lacks data_batch_3"):
        locate("cifar10", root / "cifar-10-batches-py")


def test_not_found_lists_places_and_remedies(root):
    for dataset, places in {
        "mnist": [root / "mnist", root / "MNIST" / "raw", root],
        "fashion_mnist": [root / "fashion_mnist", root / "FashionMNIST" / "raw"],
        "cifar10": [root / name for name in ("cifar-10-batches-py", "cifar-10-python.tar.gz", "cifar10")],
    }.items():
        with pytest.raises(DataError) as caught:
            load(dataset, "train")
        for text in (*places, "download: true", "FASTROBUST_DATA", "apt-get install dataset-fashion-mnist"):
            assert str(text) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("cifar", "train"), {}, "unknown dataset 'cifar'.*mean 'cifar10'"),
        (("zzzz", "train"), {}, "unknown dataset 'zzzz': known are mnist, .*image_folder"),
        (("mnist", "val"), {}, "no split 'val'"),
        (("mnist", "train"), {"limit": 0}, "limit must be at least 1"),
        (("mnist", "train"), {"resolution": 32}, "28 x 28 pixels"),
        (("image_folder", "train", "x"), {}, "needs a resolution"),
        (("image_folder", "train", "x"), {"resolution": 0}, "needs a resolution"),
        (("image_folder", "train"), {"resolution": 8}, "Set `path`"),
        (("image_folder", "train", "x"), {"resolution": 8, "download": True}, "x: does not exist"),
    ],
)
def test_wrong_arguments(root, arguments, options, message):
    with pytest.raises(DataError, match=f"(?s){message}"):
        load(*arguments, **options)


def fake_torchvision(monkeypatch, name, fetch):
    datasets = types.SimpleNamespace(**{name: fetch})
    module = types.ModuleType("fastrobust.models.torchvision_compat")
    module.import_torchvision = lambda: types.SimpleNamespace(datasets=datasets)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_download_only_when_nothing_is_found(root, monkeypatch):
    files, truth = cifar_batches()
    calls = []

    def fetch(folder, download):
        calls.append((folder, download))
        write_files(Path(folder, "cifar-10-batches-py"), files)

    fake_torchvision(monkeypatch, "CIFAR10", fetch)
    with pytest.raises(DataError, match="not found"):
        load("cifar10", "test")
    assert calls == []
    for _ in range(2):
        result = load("cifar10", "test", download=True)
        np.testing.assert_array_equal(pixels_of(result), truth["test_batch"][0])
    load("cifar10", "test", root / "mine", download=True)
    assert calls == [(str(root), True), (str(root / "mine"), True)]


def test_failed_download(root, monkeypatch):
    def fetch(folder, download):
        raise OSError("no route to host")

    fake_torchvision(monkeypatch, "MNIST", fetch)
    with pytest.raises(DataError, match=r"mnist could not be downloaded.*no route to host.*copy the data"):
        load("mnist", "train", download=True)


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_a_download_with_another_checksum_is_refused(root, monkeypatch, dataset):
    """torchvision's own download, from a server (a folder here) whose files are not the known ones."""

    datasets = import_torchvision().datasets
    server = root / "server"
    server.mkdir()
    for name, _ in datasets.MNIST.resources:
        (server / name).write_bytes(gzip.compress(b"something else"))
    (server / "cifar.tar.gz").write_bytes(gzip.compress(tar_bytes(cifar_batches(1)[0])))
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{server.as_uri()}/"])
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{server.as_uri()}/cifar.tar.gz")
    with pytest.raises(DataError, match=rf"{dataset} could not be downloaded"):
        load(dataset, "train", root / "mine", download=True)
    with pytest.raises(DataError):
        load(dataset, "train", root / "mine")


# ---- CIFAR-10 batches


@pytest.mark.parametrize("form", ["folder", "tar.gz", "path to tar.gz"])
def test_cifar_batches(root, form):
    files, truth = cifar_batches()
    if form == "folder":
        place = write_files(root / "cifar-10-batches-py", files)
    else:
        place = root / ("cifar-10-python.tar.gz" if form == "tar.gz" else "renamed.tgz")
        members = {f"cifar-10-batches-py/{name}": files[name] for name in reversed(files)}
        place.write_bytes(gzip.compress(tar_bytes(members)))
    path = place if form == "path to tar.gz" else None
    train, test = (load("cifar10", split, path) for split in ("train", "test"))
    check_form(train, 20, 3, 32, CIFAR)
    check_form(test, 4, 3, 32, CIFAR)
    batches = [truth[name] for name in formats.CIFAR_BATCHES["train"]]
    np.testing.assert_array_equal(pixels_of(train), np.concatenate([pixels for pixels, _ in batches]))
    assert train.labels.tolist() == [label for _, labels in batches for label in labels]
    np.testing.assert_array_equal(pixels_of(test), truth["test_batch"][0])
    assert test.labels.tolist() == truth["test_batch"][1]
    assert test.source == str(place)
    np.testing.assert_array_equal(pixels_of(load("cifar10", "train", path, limit=5)), pixels_of(train)[::4])


def test_cifar_batch_pickled_by_python_2(root):
    """The opcodes of the official files: byte strings for the keys and for the array's buffer."""
    pixels = RNG.integers(0, 256, 3072, np.uint8).tobytes()

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(value)) + value

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR"
        b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + text(pixels) + b"tb"
    )
    batch = b"\x80\x02}(" + text(b"data") + array + text(b"labels") + b"](K\x07eu."
    write_files(root / "cifar-10-batches-py", {**cifar_batches(1)[0], "test_batch": batch})
    result = load("cifar10", "test")
    assert result.labels.tolist() == [7]
    assert result.images[0].contiguous().numpy().tobytes() == pixels


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "system"), (eval, "eval"), (np.load, "load"), (codecs.open, "open"), (getattr, "getattr")],
)
def test_malicious_pickle_does_not_run(root, function, name):
    marker = root / "marker"
    argument = f"touch {marker}" if function is os.system else f"open({str(marker)!r}, 'w')"
    bad = pickle.dumps({"data": Malicious(function, argument), "labels": []}, protocol=2)
    place = write_files(root / "cifar-10-batches-py", {**cifar_batches(1)[0], "data_batch_2": bad})
    with pytest.raises(DataError, match=rf"data_batch_2.*{name}, which is forbidden"):
        load("cifar10", "train")
    assert not marker.exists()
    if function is os.system:  # the pickle does what it is meant to when it is let
        pickle.loads((place / "data_batch_2").read_bytes())
        assert marker.exists()


PLANES = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"labels": [1, 2]}, "'data'"),
        ({"data": PLANES}, "'labels'"),
        ([PLANES, [1, 2]], "TypeError"),
        ({"data": PLANES[:, 1:], "labels": [1, 2]}, r"\(2, 3071\)"),
        ({"data": PLANES.astype(np.float32), "labels": [1, 2]}, "float32"),
        ({"data": PLANES, "labels": [1]}, "for 2 images"),
        ({"data": PLANES, "labels": ["1", "2"]}, "<U1"),
        ({"data": PLANES, "labels": [1, 10]}, r"label 10 of image 1 is outside 0\.\.9"),
        ({"data": PLANES, "labels": [-1, 1]}, r"label -1 of image 0 is outside 0\.\.9"),
    ],
)
def test_wrong_cifar_batch(root, batch, message):
    files = {**cifar_batches(1)[0], "test_batch": pickle.dumps(batch, protocol=2)}
    write_files(root / "cifar-10-batches-py", files)
    with pytest.raises(DataError, match=f"test_batch.*{message}"):
        load("cifar10", "test")


def test_truncated_and_missing_cifar_batches(root):
    files = cifar_batches(1)[0]
    place = write_files(root / "cifar-10-batches-py", {**files, "test_batch": files["test_batch"][:-200]})
    with pytest.raises(DataError, match=r"test_batch.*truncated"):
        load("cifar10", "test")
    archive = root / "cifar-10-python.tar.gz"
    packed = gzip.compress(tar_bytes({f"cifar-10-batches-py/{name}": files[name] for name in files}))
    archive.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz is truncated"):
        load("cifar10", "test", archive)
    archive.write_bytes(gzip.compress(tar_bytes({"cifar-10-batches-py/data_batch_1": files["data_batch_1"]})))
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz lacks .* test_batch"):
        load("cifar10", "test", archive)
    assert place.exists()
