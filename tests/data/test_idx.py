"""Tests of fastrobust.data.sets: idx files, whole, damaged and hostile."""

import gzip
import hashlib
import struct
import tracemalloc

import numpy as np
import pytest
from data_files import check_form, fashion_mnist, idx, idx_folder, real

from fastrobust.config.datasets import DATASETS
from fastrobust.data import sets
from fastrobust.data.sets import load, read_idx_pair
from fastrobust.runtime import limits
from fastrobust.runtime.errors import DataError

pytestmark = pytest.mark.filterwarnings("error")  # a warning from numpy, torch or Pillow is a defect here


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty data root, with the system-wide Fashion-MNIST out of sight."""
    monkeypatch.setenv("FASTROBUST_DATA", str(tmp_path))
    monkeypatch.setitem(sets._PLACES, "fashion_mnist", ["fashion_mnist", "FashionMNIST/raw"])
    return tmp_path


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
        (b"", LABELS, "images.* is empty"),
        (gzip.compress(IMAGES, mtime=0)[:-12], LABELS, "images.* is truncated"),
        (gzip.compress(IMAGES, mtime=0)[:-2], LABELS, "images.* is truncated"),
        (gzip.compress(IMAGES[:-1], mtime=0), LABELS, "images.* is truncated"),
        (IMAGES + b"\0", LABELS, "images.* more follow"),
        (gzip.compress(IMAGES, mtime=0) + b"trailing", LABELS, "images.* corrupt"),
        (gzip.compress(IMAGES, mtime=0)[:-8] + bytes(8), LABELS, "images.* corrupt"),
        (gzip.compress(IMAGES, mtime=0)[:12] + b"\xff" * 40, LABELS, "images.* corrupt"),
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
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemAvailable: 9 kB\n")
    monkeypatch.setattr(limits, "ROOT", tmp_path)
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
        assert result.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
        assert result.labels[:5].tolist() == [5, 0, 4, 1, 9]


def test_real_fashion_mnist():
    result = load("fashion_mnist", "test", fashion_mnist())
    check_form(result, 10000, 1, 28, DATASETS["fashion_mnist"].classes)
    assert result.labels.bincount().tolist() == [1000] * 10
    assert result.labels[0] == 9  # an ankle boot
