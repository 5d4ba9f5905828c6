"""Tests of fastrobust.data.sources, against what the test wrote or what Pillow makes of the same bytes."""

import codecs
import gzip
import hashlib
import io
import itertools
import lzma
import os
import pickle
import struct
import sys
import tarfile
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from endure.fuzz import encoded
from fastrobust.data import formats, sources
from fastrobust.data.sources import DATASETS, load, locate, read_idx_pair
from fastrobust.errors import DataError

pytestmark = pytest.mark.filterwarnings("error")  # a warning from numpy, torch or Pillow is a defect here
RNG = np.random.default_rng(0)
CIFAR = DATASETS["cifar10"].classes


def real(*parts: str) -> Path:
    """A path below $FASTROBUST_DATA; the test is skipped where that is absent."""
    path = Path(os.environ.get("FASTROBUST_DATA") or "absent", *parts)
    if not path.exists():
        pytest.skip(f"needs the real data {'/'.join(parts)} in $FASTROBUST_DATA")
    return path


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty data root, with the system-wide Fashion-MNIST out of sight."""
    monkeypatch.setenv("FASTROBUST_DATA", str(tmp_path))
    monkeypatch.setitem(sources._PLACES, "fashion_mnist", ["fashion_mnist", "FashionMNIST/raw"])
    return tmp_path


# ---- writers


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def idx_folder(folder: Path, count: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """The four MNIST files with random pixels, the train files gzipped; returns the train arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    images = RNG.integers(0, 256, (count, 28, 28), np.uint8)
    labels = np.arange(count, dtype=np.uint8) % 10
    for name, array in zip(sources._IDX_NAMES["train"], (images, labels), strict=True):
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    for name, array in zip(sources._IDX_NAMES["test"], (images[:10], labels[:10]), strict=True):
        (folder / name).write_bytes(idx(array))
    return images, labels


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def noise_png(size: int = 32) -> bytes:
    return png(RNG.integers(0, 256, (size, size, 3), np.uint8))


def image_set(classes=("cat", "dog"), count=3, size=32, folders=("train", "val")) -> dict[str, bytes]:
    """Member names and PNG bytes of an image set, in no particular order."""
    names = [f"{folder}/{name}/{i}.png" for i in range(count) for folder in folders for name in classes]
    return {name: noise_png(size) for name in names}


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def tar_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def cifar_batches(count: int = 4) -> tuple[dict[str, bytes], dict[str, tuple[np.ndarray, list[int]]]]:
    """Batch files as the official ones are (protocol 2), and (pixels N x 32 x 32 x 3, labels) for each."""
    files, truth = {}, {}
    for name in [*formats.CIFAR_BATCHES["train"], "test_batch"]:
        pixels = RNG.integers(0, 256, (count, 32, 32, 3), np.uint8)
        labels = RNG.integers(0, 10, count).tolist()
        planar = np.stack([pixels[..., channel].reshape(count, 1024) for channel in range(3)], 1)
        files[name] = pickle.dumps({"data": planar.reshape(count, 3072), "labels": labels}, protocol=2)
        truth[name] = pixels, labels
    return files, truth


def pixels_of(result) -> np.ndarray:
    return result.images.permute(0, 2, 3, 1).numpy()


def check_form(result, count, channels, size, classes):
    assert result.images.shape == (count, channels, size, size) and result.images.dtype == torch.uint8
    assert result.images.is_contiguous(memory_format=torch.channels_last)
    assert result.images.permute(0, 2, 3, 1).is_contiguous()
    assert result.labels.shape == (count,) and result.labels.dtype == torch.int64
    assert result.classes == tuple(classes)


# ---- idx


def test_idx_pair_plain_and_gzipped(tmp_path):
    images, labels = idx_folder(tmp_path)
    read = read_idx_pair(*(tmp_path / f"{name}.gz" for name in sources._IDX_NAMES["train"]), 10)
    np.testing.assert_array_equal(read[0], images)
    np.testing.assert_array_equal(read[1], labels)
    read = read_idx_pair(*(tmp_path / name for name in sources._IDX_NAMES["test"]), 10)
    np.testing.assert_array_equal(read[0], images[:10])
    np.testing.assert_array_equal(read[1], labels[:10])


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist"])
def test_idx_load_and_limit(root, monkeypatch, dataset):
    images, labels = idx_folder(root / dataset)
    digests = [hashlib.md5(idx(array)).hexdigest() for array in (images, labels)]
    monkeypatch.setitem(sources._IDX_MD5, (dataset, "train"), digests)
    result = load(dataset, "train")
    check_form(result, 20, 1, 28, DATASETS[dataset].classes)
    np.testing.assert_array_equal(result.images[:, 0].numpy(), images)
    assert result.labels.tolist() == labels.tolist()
    for name in sources._IDX_NAMES["train"]:
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
    monkeypatch.setattr(formats, "_MEMINFO", tmp_path / "meminfo")
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
    if not Path(sources._DEBIAN_FASHION).exists():
        pytest.skip("needs the package dataset-fashion-mnist")
    result = load("fashion_mnist", "test", sources._DEBIAN_FASHION)
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
    from fastrobust.models.torchvision_compat import import_torchvision

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


# ---- folders and tar files of images


def expected_set(files: dict[str, bytes], folder: str) -> tuple[np.ndarray, list[int], list[str]]:
    classes = sorted({name.split("/")[1] for name in files})
    names = sorted((n for n in files if n.startswith(f"{folder}/")), key=lambda name: name.split("/", 2))
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(files[name]))) for name in names])
    return pixels, [classes.index(name.split("/")[1]) for name in names], classes


FORMS = ["folder", "tar", "tar with ./", "tar.gz", "tar.xz", "folder of tars", "folder with tar.xz"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dataset", ["image_folder", "cifar10"])
def test_image_sets(tmp_path, form, dataset):
    if dataset == "cifar10" and form == "folder of tars":
        pytest.skip("an image folder's form only")
    classes = CIFAR if dataset == "cifar10" else ("b", "a-b", "B", "a")
    files = image_set(classes, 3, folders=("train", "test"))
    files[f"train/{classes[0]}/nested/deep.PNG"] = noise_png()
    skipped = {"train/README.txt": b"text", "train/1.png": b"x", f"train/{classes[1]}/._1.png": b"x"}
    everything = {**files, **skipped}
    path = tmp_path / "set"
    if form == "folder":
        write_files(path, everything)
    elif form == "folder of tars":
        parts = [dict(list(everything.items())[start::3]) for start in range(3)]
        write_files(path, {f"part-{i}.tar": tar_bytes(part) for i, part in enumerate(parts)})
    elif form == "folder with tar.xz":
        write_files(path, {"images.tar.xz": lzma.compress(tar_bytes(everything)), "notes.txt": b""})
    else:
        if "./" in form:
            everything = {f"./{name}": data for name, data in everything.items()}
        pack = {"tar.gz": gzip.compress, "tar.xz": lzma.compress}.get(form, bytes)
        path.write_bytes(pack(tar_bytes(everything)))
    options = {"resolution": 32} if dataset == "image_folder" else {}
    for split in ("train", "test"):
        result = load(dataset, split, path, **options)
        pixels, labels, names = expected_set(files, split)
        check_form(result, len(labels), 3, 32, names)
        np.testing.assert_array_equal(pixels_of(result), pixels)
        assert result.labels.tolist() == labels
        assert result.source.startswith(str(path))
        assert ("part-0.tar" in result.source) == (form == "folder of tars")


def test_linked_class_folder(tmp_path):
    write_files(tmp_path / "set", image_set(("cat",)))
    write_files(tmp_path / "elsewhere", {"1.png": noise_png()})
    for split in ("train", "val"):
        (tmp_path / "set" / split / "dog").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    result = load("image_folder", "test", tmp_path / "set", resolution=32)
    assert result.classes == ("cat", "dog")
    assert result.labels.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("folder", ["val", "test", "validation"])
def test_limit_keeps_all_classes_and_is_deterministic(tmp_path, folder):
    files = image_set(("a", "b", "c"), 8, 8, ("train", folder))
    write_files(tmp_path / "one", files)
    write_files(tmp_path / "two", dict(reversed(files.items())))
    for split, name in (("train", "train"), ("test", folder)):
        pixels, labels, _ = expected_set(files, name)
        first = load("image_folder", split, tmp_path / "one", resolution=8, limit=6)
        second = load("image_folder", split, tmp_path / "two", resolution=8, limit=6)
        np.testing.assert_array_equal(pixels_of(first), pixels[::4])
        assert first.labels.tolist() == labels[::4] == [0, 0, 1, 1, 2, 2]
        assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


def save(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_modes_rotation_and_resizing_match_pillow(tmp_path):
    smooth = np.add.outer(np.arange(50), 2 * np.arange(93))[..., None] + np.array([0, 30, 60])
    rgb = Image.fromarray((smooth + RNG.integers(0, 20, smooth.shape)).clip(0, 255).astype(np.uint8))
    alpha = Image.fromarray(RNG.integers(0, 256, (50, 93), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    cases = {
        "alpha.png": (save(rgba, "PNG"), rgb),
        "bilevel.png": (save(rgb.convert("1"), "PNG"), rgb.convert("1").convert("RGB")),
        "cmyk.jpg": (data := save(rgb.convert("CMYK"), "JPEG"), Image.open(io.BytesIO(data)).convert("RGB")),
        "grey.jpg": (data := save(rgb.convert("L"), "JPEG"), Image.open(io.BytesIO(data)).convert("RGB")),
        "greyalpha.png": (save(rgba.convert("LA"), "PNG"), rgba.convert("L").convert("RGB")),
        "palette.png": (save(rgb.quantize(64), "PNG"), rgb.quantize(64).convert("RGB")),
        "palettealpha.png": (
            save(rgb.quantize(64), "PNG", transparency=bytes(range(64))),
            rgb.quantize(64).convert("RGB"),
        ),
        "rotated.png": (save(rgb, "PNG", exif=exif), rgb.transpose(Image.Transpose.ROTATE_270)),
        "rotated.jpg": (
            data := save(rgb, "JPEG", exif=exif),
            Image.open(io.BytesIO(data)).transpose(Image.Transpose.ROTATE_270),
        ),
        "tall.webp": (save(rgb.rotate(90, expand=True), "WEBP", lossless=True), rgb.rotate(90, expand=True)),
    }
    write_files(tmp_path, {f"train/a/{name}": data for name, (data, _) in cases.items()})
    write_files(tmp_path, {"val/a/1.png": noise_png(40)})
    result = load("image_folder", "train", tmp_path, resolution=32)
    for name, pixels in zip(sorted(cases), pixels_of(result), strict=True):
        upright = cases[name][1]
        assert upright.mode == "RGB"
        wide = upright.width > upright.height
        size = (59, 32) if wide else (32, 59)  # 59 = floor(32 * 93 / 50)
        small = upright.resize(size, Image.Resampling.BICUBIC)
        crop = small.crop((14, 0, 46, 32) if wide else (0, 14, 32, 46))  # 14 = round((59 - 32) / 2)
        np.testing.assert_array_equal(pixels, np.asarray(crop), err_msg=name)
    assert ImageOps.exif_transpose(Image.open(tmp_path / "train/a/rotated.png")).size == (50, 93)
    enlarged = load("image_folder", "test", tmp_path, resolution=64)
    original = Image.open(tmp_path / "val/a/1.png")
    larger = original.resize((64, 64), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pixels_of(enlarged)[0], np.asarray(larger))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (noise_png()[:-60], "[Tt]runcated"),
        (b"no image", "cannot identify"),
        (b"", "cannot identify"),
        (png(np.zeros((32, 32), np.uint16)), "more than 8 bits"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n", "cannot identify"),
    ],
)
def test_unusable_image_is_named(tmp_path, bad, message):
    files = image_set()
    files["train/dog/1.png"] = bad
    write_files(tmp_path / "folder", files)
    (tmp_path / "set.tar.gz").write_bytes(gzip.compress(tar_bytes(files)))
    (tmp_path / "set.tar").write_bytes(tar_bytes(files))
    for place in ("folder", "set.tar.gz", "set.tar"):
        with pytest.raises(DataError, match=f"train/dog/1.png.*{message}") as caught:
            load("image_folder", "train", tmp_path / place, resolution=16)
        assert str(tmp_path / place) in str(caught.value) and "remove" in str(caught.value)
        assert len(load("image_folder", "test", tmp_path / place, resolution=16).labels) == 6


def test_a_png_that_pillow_decodes_to_other_pixels_is_noticed_by_its_checksum(tmp_path):
    content = encoded(0, "PNG")  # 48 x 48
    right = Image.open(io.BytesIO(content)).tobytes()
    found = 0
    for place, bit in itertools.product(range(len(content) - 160, len(content) - 12), (1, 16)):
        changed = content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
        try:
            unnoticed = Image.open(io.BytesIO(changed)).tobytes() != right
        except Exception:  # Pillow refuses it, in one of many ways: nothing goes unnoticed
            continue
        if unnoticed:
            found += 1
            write_files(tmp_path, image_set(size=48) | {"train/cat/0.png": changed})
            with pytest.raises(DataError, match=r"train/cat/0\.png is not a usable image"):
                load("image_folder", "train", tmp_path, resolution=48)
    assert found


def test_cifar_images_must_be_32_pixels(tmp_path):
    write_files(tmp_path, {**image_set(CIFAR, 1), "train/ship/0.png": noise_png(33)})
    with pytest.raises(DataError, match=r"train/ship/0\.png.*33 x 33 pixels, not 32 x 32"):
        load("cifar10", "train", tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (image_set(folders=("train",)), "one of test/.*images in train$"),
        (image_set(folders=("val",)), "images in val$"),
        (image_set(folders=("train", "val", "test")), "images in test, train, val$"),
        ({"train/1.png": noise_png(), "val/a/readme": b""}, "images in no such folder$"),
        ({"train/cat/notes.txt": b"", "val/cat/notes.txt": b""}, "images in no such folder$"),
        ({**image_set(), "train/emu/1.png": noise_png()}, "same classes, but differ in emu$"),
        ({**image_set(), "val/emu/1.png": noise_png()}, "same classes, but differ in emu$"),
    ],
)
def test_wrong_layout(tmp_path, files, message):
    write_files(tmp_path / "folder", files)
    (tmp_path / "set.tar").write_bytes(tar_bytes(files))
    with pytest.raises(DataError, match=f"set.tar.*{message}"):
        load("image_folder", "train", tmp_path / "set.tar", resolution=16)
    with pytest.raises(DataError, match=f"{message}|holds neither train/ nor"):
        load("image_folder", "train", tmp_path / "folder", resolution=16)


def test_cifar_class_names_are_checked(tmp_path):
    write_files(tmp_path, image_set((*CIFAR[:-1], "lorry"), 1))
    with pytest.raises(DataError, match="differ in lorry, truck"):
        load("cifar10", "test", tmp_path)


def test_empty_folder_several_archives_and_overlapping_archives(tmp_path):
    with pytest.raises(DataError, match="holds neither train/ nor"):
        load("image_folder", "train", tmp_path, resolution=16)
    files = image_set()
    write_files(tmp_path, {"a.tar": tar_bytes(files), "b.tar": tar_bytes({"val/dog/1.png": noise_png()})})
    with pytest.raises(DataError, match=r"val/dog/1\.png occurs 2 times"):
        load("image_folder", "train", tmp_path, resolution=16)
    with pytest.raises(DataError, match="holds 2 archives"):
        load("cifar10", "train", tmp_path)


def test_damaged_archives(tmp_path):
    plain = tar_bytes(image_set(count=20))
    member = len(plain) // 2 // 512 * 512
    header = plain.index(b"val/dog/9.png")
    cases = {
        "cut inside a member.tar": plain[: member + 100],
        "cut at a header.tar": plain[:header],
        "cut inside a header.tar": plain[: header + 100],
        "damaged header.tar": plain[: header + 1] + b"YYYY" + plain[header + 5 :],
        "two in one.tar": plain + plain,
        "cut.tar.gz": gzip.compress(plain)[:-1000],
        "cut.tar.xz": lzma.compress(plain)[:-1000],
        "cut off the end mark.tar.xz": lzma.compress(plain[:header]),
        "damaged.tar.xz": lzma.compress(plain)[:1000] + bytes(100) + lzma.compress(plain)[1100:],
        "damaged.tar.gz": gzip.compress(plain)[:-8] + bytes(8),
        "not a tar.tar": b"hello" * 1000,
        "empty.tar": b"",
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name} is truncated") as caught:
            load("image_folder", "train", tmp_path / name, resolution=16)
        assert "fetch it again" in str(caught.value)


@pytest.mark.parametrize("kind, target", [(tarfile.LNKTYPE, "train/cat/0.png"), (tarfile.SYMTYPE, "/etc/passwd")])
def test_links_in_archives_are_refused(tmp_path, kind, target):
    link = tarfile.TarInfo("train/cat/link.png")
    link.type, link.linkname = kind, target
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.addfile(link)
    with pytest.raises(DataError, match=r"train/cat/link\.png in .*set\.tar is a link"):
        load("image_folder", "train", tmp_path / "set.tar", resolution=16)


def test_archive_is_not_extracted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {**image_set(), "../outside.png": noise_png(), str(tmp_path / "absolute.png"): noise_png()}
    (tmp_path / "set.tar.gz").write_bytes(gzip.compress(tar_bytes(files)))
    load("image_folder", "train", tmp_path / "set.tar.gz", resolution=16)
    assert [file.name for file in tmp_path.iterdir()] == ["set.tar.gz"]


def test_set_larger_than_the_memory(tmp_path, monkeypatch):
    files = image_set(size=100)
    (tmp_path / "set.tar").write_bytes(tar_bytes(files))
    (tmp_path / "set.tar.xz").write_bytes(lzma.compress(tar_bytes(files)))
    monkeypatch.setattr(formats, "_MEMINFO", tmp_path / "meminfo")
    needed = 6 * 100 * 100 * 3
    for share, enough in ((1, False), (0.81, False), (0.79, True)):
        available = round(needed / share / 1024)
        (tmp_path / "meminfo").write_text(f"MemTotal: 9999999 kB\nMemAvailable:  {available} kB\n")
        if enough:
            assert len(load("image_folder", "train", tmp_path / "set.tar", resolution=100).labels) == 6
        else:
            with pytest.raises(DataError, match=r"needs 0\.00018 GB of memory.*limit"):
                load("image_folder", "train", tmp_path / "set.tar", resolution=100)
        with pytest.raises(DataError, match=r"set\.tar\.xz, uncompressed, needs"):
            load("image_folder", "train", tmp_path / "set.tar.xz", resolution=100)
    (tmp_path / "meminfo").unlink()
    assert len(load("image_folder", "train", tmp_path / "set.tar", resolution=100).labels) == 6


def test_real_cifar10_jpeg(monkeypatch):
    archive = real("cifar10-jpeg", "cifar10_jpeg.tar.xz")
    listing, members = formats.tar_members, {}

    def spy(path):  # saves reading the archive a second time
        members.update((member.name, member) for member in listing(path))
        return list(members.values())

    monkeypatch.setattr(formats, "tar_members", spy)
    result = load("cifar10", "test", archive)
    check_form(result, 10000, 3, 32, CIFAR)
    assert result.labels.tolist() == [label for label in range(10) for _ in range(1000)]
    assert result.source == str(archive)
    assert len(members) == 60000
    for index, name in ((0, "test/airplane/0000.jpg"), (9999, "test/truck/0999.jpg")):
        image = Image.open(io.BytesIO(members[name].read()))
        np.testing.assert_array_equal(pixels_of(result)[index], np.asarray(image))


def test_real_imagenette():
    folder = real("imagenette-224")
    result = load("image_folder", "test", folder, resolution=64, limit=50)
    with tarfile.open(folder / "val.tar") as tar:
        names = sorted(name for name in tar.getnames() if name.endswith(".JPEG"))
        first = Image.open(tar.extractfile(names[0])).convert("RGB")
        first = first.resize((64, 64), Image.Resampling.BICUBIC)
    check_form(result, 50, 3, 64, sorted({name.split("/")[1] for name in names}))
    assert set(result.labels.tolist()) == set(range(10))
    np.testing.assert_array_equal(pixels_of(result)[0], np.asarray(first))
    wanted = [names[i * len(names) // 50].split("/")[1] for i in range(50)]
    assert [result.classes[label] for label in result.labels] == wanted
