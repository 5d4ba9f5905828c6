"""Tests of fastrobust.data.sets: finding and downloading, CIFAR-10 batches. For images: test_image_sets.py."""

import codecs
import gzip
import os
import pickle
import struct
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import CIFAR, RNG, check_form, cifar_batches, idx_folder, pixels_of, tar_bytes, write_files

from fastrobust.data import downloads, formats, sets
from fastrobust.data.sets import ImageSet, load, locate
from fastrobust.runtime.errors import DataError
from fastrobust.runtime.torchvision_compat import import_torchvision

pytestmark = pytest.mark.filterwarnings("error")  # a warning from numpy, torch or Pillow is a defect here


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty data root, with the system-wide Fashion-MNIST out of sight."""
    monkeypatch.setenv("FASTROBUST_DATA", str(tmp_path))
    monkeypatch.setitem(sets._PLACES, "fashion_mnist", ["fashion_mnist", "FashionMNIST/raw"])
    return tmp_path


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
    with pytest.raises(DataError, match=r"(?s)nowhere: it has no usual place.*`data.path` in the config, .*`--data PATH`"):
        load("image_folder", "train", resolution=8)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("cifar", "train"), {}, "data.dataset: 'cifar' is not one of mnist, .*mean 'cifar10'"),
        (("zzzz", "train"), {}, "'zzzz' is not one of mnist, .*arrays, or your own package.module:name"),
        (("mnist", "val"), {}, "no split 'val'"),
        (("mnist", "train"), {"limit": 0}, "limit must be at least 1"),
        (("mnist", "train"), {"resolution": 32}, "28 x 28 pixels"),
        (("image_folder", "train", "x"), {}, "needs a resolution"),
        (("image_folder", "train", "x"), {"resolution": 0}, "needs a resolution"),
        (("image_folder", "train"), {"resolution": 8}, "Set `data.path`"),
        (("image_folder", "train", "x"), {"resolution": 8, "download": True}, "x: does not exist"),
    ],
)
def test_wrong_arguments(root, arguments, options, message):
    with pytest.raises(DataError, match=f"(?s){message}"):
        load(*arguments, **options)


def fake_torchvision(monkeypatch, name, fetch):
    datasets = types.SimpleNamespace(**{name: fetch})
    monkeypatch.setattr(downloads, "import_torchvision", lambda: types.SimpleNamespace(datasets=datasets))


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


def test_a_download_says_where_it_goes_and_leaves_no_empty_folders(root, monkeypatch, capsys):
    def fetch(folder, download):
        (Path(folder) / "MNIST" / "raw").mkdir(parents=True)
        raise OSError("no route to host")

    fake_torchvision(monkeypatch, "MNIST", fetch)
    before = sorted(root.rglob("*"))
    with pytest.raises(DataError, match="could not be downloaded"):
        load("mnist", "train", root / "typo" / "deep", download=True)
    assert sorted(root.rglob("*")) == before
    assert f"mnist is downloaded to {root / 'typo' / 'deep'}" in capsys.readouterr().out


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
        ({"data": PLANES, "labels": [1, 10]}, r"they count from 1, so subtract 1"),
        ({"data": PLANES, "labels": [2, 10]}, r"if the file is a published one, fetch it again"),
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


# ---- labels by the names of classes, and parts of a set

NAMES = ("cat", "dog", "eel", "fox", "gnu", "hen")


def animals(classes: tuple[str, ...], labels: list[int]) -> ImageSet:
    """Image k is all k."""
    pixels = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 3, 2).contiguous()
    return ImageSet(pixels.permute(0, 3, 1, 2), torch.tensor(labels), classes, "the zoo")


def test_labels_are_matched_by_name(capsys):
    """Folders sort their classes by name; a model may have them in another order."""
    data = animals(("cat", "dog", "eel"), [0, 1, 2, 2, 0])
    found = data.labelled_as(("eel", "cat", "dog"), "the model")
    assert [found.classes[label] for label in found.labels] == [data.classes[label] for label in data.labels]
    assert found.labels.tolist() == [1, 2, 0, 0, 1] and found.labels.dtype == torch.int64
    assert torch.equal(found.images, data.images) and found.source == "the zoo"
    assert data.labels.tolist() == [0, 1, 2, 2, 0] and data.classes == ("cat", "dog", "eel")
    assert data.labelled_as(data.classes, "the model") is data
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("have", "absent"),
    [(("gnu", "dog"), "4 classes (cat, eel, fox, hen)"), (("hen", "gnu", "fox", "eel", "dog"), "class cat")],
)
def test_a_part_of_the_classes_is_allowed_and_said(capsys, have, absent):
    found = animals(have, [1, 0, 1]).labelled_as(NAMES, "the model")
    assert [NAMES[label] for label in found.labels] == [have[1], have[0], have[1]] and found.classes == NAMES
    assert capsys.readouterr().out == f"note: the zoo has no images of {absent}: accuracies are over the other classes\n"


@pytest.mark.parametrize(
    ("have", "unknown"),
    [
        (("cat", "yak"), "class yak"),
        (("Cat", "dog", "ant"), r"2 classes \(Cat, ant\)"),
        (tuple("stuvwxyz"), r"8 classes \(s, t, u, v, w, ...\)"),
        (tuple("012345"), r"6 classes \(0, 1, 2, 3, 4, ...\)"),  # as many as the model's, in their order
    ],
)
def test_a_class_that_the_model_does_not_know_is_refused(capsys, have, unknown):
    trained = r"runs/a has 6 classes \(cat, dog, eel, fox, gnu, ...\)"
    with pytest.raises(DataError, match=f"^the zoo has images of {unknown}, but {trained}: give images of the same classes"):
        animals(have, [0, 1]).labelled_as(NAMES, "runs/a")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor])
def test_take_gives_the_named_images_in_their_order(form):
    data = animals(NAMES, [5, 4, 3, 2, 1, 0])
    found = data.take(form([4, 0, 3]))
    check_form(found, 3, 2, 3, NAMES)
    assert found.images[:, 0, 0, 0].tolist() == [4, 0, 3] and found.labels.tolist() == [1, 5, 2]
    assert found.source == "the zoo" and len(data.labels) == 6
    assert torch.equal(data.take(range(1, 6, 2)).labels, data.labels[1::2])
    assert data.take([]).images.shape == (0, 2, 3, 3)


def test_checksums_tell_sets_apart():
    """Pixels, labels and class names count; where the set came from, and how it lies in memory, do not."""
    data = animals(NAMES, [0, 1, 2])
    whole = data.checksum()
    assert replace(data, source="elsewhere").checksum() == whole
    assert replace(data, images=data.images.contiguous()).checksum() == whole
    brighter, relabelled = data.images.clone(), data.labels.clone()
    brighter[1, 1, 2, 2] += 1
    relabelled[2] = 3
    changed = [replace(data, images=brighter), replace(data, labels=relabelled), replace(data, classes=NAMES[::-1])]
    changed += [data.take([0, 1]), data.take([1, 0, 2])]
    assert len({whole, *(other.checksum() for other in changed)}) == 6
