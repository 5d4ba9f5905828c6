"""CIFAR-100, SVHN, Tiny-ImageNet and ImageNet-100: tiny files in the published formats."""

from __future__ import annotations

import gzip
import io
import pickle
import re
import subprocess
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import RNG, check_form, image_set, noise_png, pixels_of, tar_bytes, write_files
from PIL import Image

from fastrobust.config import reading
from fastrobust.data import downloads, sets
from fastrobust.data.cifar100 import CLASSES
from fastrobust.runtime.distributed import ALONE
from fastrobust.runtime.errors import DataError
from fastrobust.train import start

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROBUST_DATA", str(tmp_path))
    return tmp_path


def cifar100(count: int = 6, **meta) -> tuple[dict[str, bytes], dict[str, tuple[np.ndarray, list[int]]]]:
    """The files of the python version (protocol 2), and (pixels, fine labels) of each split."""
    files, truth = {}, {}
    for name in ("train", "test"):
        pixels = RNG.integers(0, 256, (count, 32, 32, 3), np.uint8)
        fine, coarse = RNG.integers(0, 100, count).tolist(), RNG.integers(0, 20, count).tolist()
        rows = pixels.transpose(0, 3, 1, 2).reshape(count, 3072)
        batch = {"data": rows, "fine_labels": fine, "coarse_labels": coarse, "batch_label": f"{name}ing batch 1 of 1"}
        files[name] = pickle.dumps(batch | {"filenames": [f"{k}.png" for k in range(count)]}, protocol=2)
        truth[name] = pixels, fine
    names = {"fine_label_names": list(CLASSES), "coarse_label_names": ["aquatic_mammals"]} | meta
    return files | {"meta": pickle.dumps(names, protocol=2)}, truth


@pytest.mark.parametrize("form", ["folder", "torchvision's folder", "archive", "path to an archive"])
def test_cifar100(root, form):
    files, truth = cifar100()
    place, path = root / "cifar-100-python", None
    if "archive" in form:
        place = root / "mine.tgz" if "path" in form else root / "cifar-100-python.tar.gz"
        place.write_bytes(gzip.compress(tar_bytes({f"cifar-100-python/{name}": data for name, data in files.items()})))
        path = place if "path" in form else None
    else:
        write_files(place, files)
        path = root if "torchvision" in form else None
    for split in ("train", "test"):
        found = sets.load("cifar100", split, path)
        check_form(found, 6, 3, 32, CLASSES)
        np.testing.assert_array_equal(pixels_of(found), truth[split][0])
        assert found.labels.tolist() == truth[split][1] and found.source == str(place)
    assert len(CLASSES) == 100 and list(CLASSES) == sorted(CLASSES) and CLASSES[0] == "apple" and CLASSES[-1] == "worm"


def test_damaged_cifar100_is_refused(root):
    with pytest.raises(DataError, match=r"(?s)cifar100 was not found.*cifar-100-python: does not exist.*download: true"):
        sets.load("cifar100", "train")
    files, _ = cifar100()
    place = write_files(root / "cifar-100-python", files)
    write_files(place, {"train": files["train"][:-99]})
    with pytest.raises(DataError, match="train is damaged or no CIFAR-100 batch"):
        sets.load("cifar100", "train")
    wrong = pickle.loads(files["test"]) | {"fine_labels": [0, 1, 2, 3, 4, 100]}
    write_files(place, {"test": pickle.dumps(wrong, protocol=2)})
    with pytest.raises(DataError, match=r"label 100 of image 5 is outside 0\.\.99"):
        sets.load("cifar100", "test")
    write_files(place, cifar100(fine_label_names=list(reversed(CLASSES)))[0])
    with pytest.raises(DataError, match="meta has other names of classes than CIFAR-100"):
        sets.load("cifar100", "test")
    (place / "train").unlink()
    with pytest.raises(DataError, match="lacks train"):
        sets.load("cifar100", "train", place)


def mat(pixels: np.ndarray, marks: np.ndarray) -> bytes:
    """A file of Matlab's as SVHN's are: X 32 x 32 x 3 x N, y N x 1."""
    savemat = pytest.importorskip("scipy.io").savemat
    buffer = io.BytesIO()
    savemat(buffer, {"X": pixels.transpose(1, 2, 3, 0), "y": marks[:, None].astype(np.uint8)}, do_compression=True)
    return buffer.getvalue()


def svhn(root: Path, marks=(1, 10, 9, 10, 5, 2)) -> np.ndarray:
    pixels = RNG.integers(0, 256, (len(marks), 32, 32, 3), np.uint8)
    write_files(root, {f"{split}_32x32.mat": mat(pixels, np.array(marks)) for split in ("train", "test")})
    return pixels


@pytest.mark.parametrize("folder", ["svhn", "."])
def test_svhn_and_its_label_0(root, folder):
    pixels = svhn(root / folder)
    found = sets.load("svhn", "test")
    check_form(found, 6, 3, 32, "0123456789")
    np.testing.assert_array_equal(pixels_of(found), pixels)
    assert found.labels.tolist() == [1, 0, 9, 0, 5, 2]
    assert Path(found.source) == root / folder / "test_32x32.mat"


def test_damaged_svhn_is_refused(root):
    svhn(root)
    whole = (root / "train_32x32.mat").read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "is damaged or not SVHN's"),
        (b"<!DOCTYPE html><html><body>404</body></html>" * 9, "a web page"),
        (mat(RNG.integers(0, 256, (3, 8, 8, 3), np.uint8), np.array([1, 2, 3])), r"X is uint8 \(8, 8, 3, 3\)"),
        (mat(RNG.integers(0, 256, (3, 32, 32, 3), np.uint8), np.array([1, 2])), r"y is uint8 \(2, 1\) for 3 images"),
        (mat(RNG.integers(0, 256, (3, 32, 32, 3), np.uint8), np.array([0, 1, 2])), r"label 0 is outside 1\.\.10"),
        (mat(RNG.integers(0, 256, (3, 32, 32, 3), np.uint8), np.array([11, 1, 2])), r"label 11 is outside 1\.\.10"),
    ):
        write_files(root, {"train_32x32.mat": content})
        with pytest.raises(DataError, match=message):
            sets.load("svhn", "train")
    (root / "train_32x32.mat").unlink()
    with pytest.raises(DataError, match=r"svhn: does not exist\n(?s:.*)lacks train_32x32.mat"):
        sets.load("svhn", "train")


@pytest.mark.parametrize("dataset", ["cifar100", "svhn"])
def test_a_download_when_nothing_is_found(root, monkeypatch, dataset):
    """Through torchvision, which has SVHN split by split."""
    calls = []

    def fetch(folder, download, **split):
        calls.append(split)
        MADE[dataset](Path(folder))

    name = {"cifar100": "CIFAR100", "svhn": "SVHN"}[dataset]
    fake = types.SimpleNamespace(datasets=types.SimpleNamespace(**{name: fetch}))
    monkeypatch.setattr(downloads, "import_torchvision", lambda: fake)
    for _ in range(2):
        assert len(sets.load(dataset, "test", download=True).labels) == 30
    assert calls == ([{"split": "train"}, {"split": "test"}] if dataset == "svhn" else [{}])


def tiny_imagenet() -> dict[str, bytes]:
    """The files of tiny-imagenet-200.zip, with 2 classes."""
    files = {f"train/{w}/images/{w}_{i}.JPEG": noise_png(64) for w in ("n01443537", "n01629819") for i in range(3)}
    files |= {f"train/{w}/{w}_boxes.txt": b"n_0.JPEG\t0\t0\t9\t9\n" for w in ("n01443537", "n01629819")}
    files |= {f"val/images/val_{i}.JPEG": noise_png(64) for i in range(4)} | {"test/images/test_0.JPEG": noise_png(64)}
    rows = [f"val_{i}.JPEG\t{'n01629819' if i % 2 else 'n01443537'}\t0\t0\t9\t9\n" for i in range(4)]
    files["val/val_annotations.txt"] = "".join(rows).encode()
    files |= {"wnids.txt": b"n01629819\nn01443537\n", "words.txt": b"n01443537\tgoldfish\n"}
    return {f"tiny-imagenet-200/{name}": data for name, data in files.items()}


def test_tiny_imagenet_by_name(root, capsys):
    place = root / "tiny-imagenet-200"
    write_files(root, tiny_imagenet())
    train, test = (sets.load("tiny_imagenet", split) for split in ("train", "test"))
    check_form(train, 6, 3, 64, ("n01443537", "n01629819"))
    check_form(test, 4, 3, 64, ("n01443537", "n01629819"))
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and test.labels.tolist() == [0, 0, 1, 1]
    assert [name.rpartition("/")[2] for name in test.names] == [f"val_{i}.JPEG" for i in (0, 2, 1, 3)]
    assert "2 files in train/ are no images" in capsys.readouterr().out
    annotations = place / "val/val_annotations.txt"
    annotations.write_text("".join(annotations.read_text().splitlines(True)[:3]))
    with pytest.raises(
        DataError, match=r"val/ holds 4 images; the file of classes names 3, but not 1 of them, such as val_3"
    ):
        sets.load("tiny_imagenet", "test")
    write_files(root, {name: data for name, data in tiny_imagenet().items() if name.endswith("txt")})
    Image.new("RGB", (32, 32)).save(place / "train/n01443537/images/n01443537_0.JPEG")
    with pytest.raises(DataError, match="32 x 32 pixels, not 64 x 64"):
        sets.load("tiny_imagenet", "train")


def test_an_imagenet_100_of_links(tmp_path):
    """docs/data.md says the commands: a list of WordNet numbers, and a folder of links to ImageNet's folders."""
    wnids = [f"n{k:08}" for k in range(5)]
    write_files(tmp_path / "imagenet", image_set(wnids, count=2, size=8))
    (tmp_path / "imagenet100.txt").write_text("".join(f"{wnid}\n" for wnid in wnids[1:4]))
    text = (ROOT / "docs/data.md").read_text()
    (commands,) = re.findall(r"```\n(mkdir -p imagenet100/.*?)```", text, re.DOTALL)
    subprocess.run(["bash", "-e", "-c", commands.replace("/data/", "")], cwd=tmp_path, check=True)
    found = sets.load("imagenet", "train", tmp_path / "imagenet100", resolution=8)
    assert found.classes == tuple(wnids[1:4]) and len(found.labels) == 6
    whole = sets.load("imagenet", "train", tmp_path / "imagenet", resolution=8)
    assert torch.equal(found.images, whole.images[2:8])
    assert sets.load("imagenet", "test", tmp_path / "imagenet100", resolution=8).classes == tuple(wnids[1:4])


MADE = {
    "cifar10": lambda root: write_files(
        root / "cifar10", image_set(sets.known("cifar10").classes, folders=("train", "test"))
    ),
    "cifar100": lambda root: write_files(root / "cifar-100-python", cifar100(30)[0]),
    "svhn": lambda root: svhn(root, (1, 10, 9, 10, 5, 2) * 5),
    "tiny_imagenet": lambda root: write_files(root, tiny_imagenet()),
}


@pytest.mark.parametrize("dataset", MADE)
def test_the_config_of_each_data_set_trains(root, tmp_path, dataset, capsys):
    """On tiny files, with a small network; the radii of the sweep have the alpha of N-FGSM's rule."""
    MADE[dataset](root)
    path = ROOT / f"configs/{dataset}_n_fgsm.yaml"
    config = reading.load(path)
    assert config.method.alpha == config.epsilon == 8 / 255 and config.method.noise == 2
    for radius in (4, 8, 12, 16):
        at = reading.load(path, [f"epsilon={radius}/255"])
        assert at.method.alpha == at.epsilon == radius / 255 and at.evaluation.epsilon == (at.epsilon,)
    small = ["model.name=preact_resnet18_w16", "phases.0.epochs=1", "phases.0.batch_size=6"]
    small += ["evaluation={steps: 1, restarts: 1}", "guard.action=off", "precision=fp32", "epsilon_warmup=0", "name=run"]
    small += [f"output={tmp_path}"]
    summary = start.run(reading.load(path, small), tmp_path / "run", CPU, ALONE)
    assert summary["evaluations"][0]["examples"] == {"cifar10": 30, "cifar100": 30, "svhn": 30, "tiny_imagenet": 4}[dataset]
