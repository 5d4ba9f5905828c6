"""Accuracy under common corruptions: tiny files in the forms of CIFAR-10-C and ImageNet-C, against a plain forward pass."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from data_files import RNG, png, write_files
from run_files import assert_explained

import fastrobust
from fastrobust.__main__ import main as cli
from fastrobust.config import reading
from fastrobust.models import create
from fastrobust.models.weights import save_weights

FACTS = {"channels": 3, "classes": 10, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)}


@pytest.fixture(scope="module")
def cifar_model(tmp_path_factory):
    """A run directory with an untrained model of CIFAR-10."""
    torch.manual_seed(0)
    run = tmp_path_factory.mktemp("cifar")
    config = reading.load("cifar10_small")
    save_weights(run, create("preact_resnet18_w16", **FACTS).eval(), config, config.facts.classes)
    return run


def cifar_c(folder, names=("fog", "snow", "saturate"), count=6) -> dict[str, np.ndarray]:
    """CIFAR-10-C's form: five severities of `count` images in each file."""
    labels = np.tile(RNG.integers(0, 10, count).astype(np.uint8), 5)
    arrays = {name: RNG.integers(0, 256, (5 * count, 32, 32, 3), np.uint8) for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (arrays | {"labels": labels}).items():
        np.save(folder / f"{name}.npy", array)
    return arrays | {"labels": labels}


def evaluate(run, folder, *words) -> int:
    return cli(["evaluate", str(run), "--corruptions", str(folder), "--device", "cpu", *words])


def test_cifar_10_c(cifar_model, tmp_path, capsys):
    arrays = cifar_c(tmp_path / "c")
    assert evaluate(cifar_model, tmp_path / "c", "--json") == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    model = fastrobust.load(cifar_model)
    for name in ("fog", "snow", "saturate"):
        x = torch.from_numpy(arrays[name]).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            right = model(x).argmax(1).numpy() == arrays["labels"]
        assert result["accuracies"][name] == [right[6 * k : 6 * k + 6].mean() for k in range(5)]
    both = [result["accuracies"][name] for name in ("fog", "snow")]  # saturate is not one of the 15
    assert result["mean_over"] == ["fog", "snow"] and result["mean_accuracy"] == pytest.approx(np.mean(both))
    assert "saturate *" in out and f"{result['mean_accuracy']:.2%} over 2 corruptions and 5 severities" in out
    (kept,) = (cifar_model / "evaluations").glob("corruptions_*.json")
    assert json.loads(kept.read_text()) == result and max(map(len, out.splitlines()[:-1])) < 130


def test_a_limit_takes_the_same_images_of_every_severity(cifar_model, tmp_path, capsys):
    cifar_c(tmp_path / "c", ("fog",), 20)
    assert evaluate(cifar_model, tmp_path / "c", "--json", "--limit", "7") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["examples"] == 7


@pytest.mark.parametrize("around", ["", "weather/"])
def test_imagenet_c_folders(finished_run, bars, tmp_path, capsys, around):
    """The test images of a run as all severities give its accuracy; a model's class names decide, not their order."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    side = next((bars / "test").iterdir()) if (bars / "test").is_dir() else next((bars / "val").iterdir())
    for severity in range(1, 6):
        shutil.copytree(side.parent, tmp_path / f"c/{around}fog/{severity}")
    assert evaluate(run, tmp_path / "c", "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        cli(
            [
                "evaluate",
                str(run),
                "--attack",
                "pgd-1-1",
                "--epsilon",
                "0.01",
                "--json",
                "--device",
                "cpu",
                "--data",
                str(bars),
            ]
        )
        == 0
    )
    clean = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["accuracies"] == {"fog": 5 * [clean["clean_accuracy"]]} and result["examples"] == clean["examples"]


def test_what_is_wrong_is_explained(cifar_model, finished_run, tmp_path, capsys):
    place = tmp_path / "c"
    place.mkdir()
    assert_explained(capsys, evaluate(cifar_model, place), "holds neither CORRUPTION.npy with labels.npy nor folders")
    cifar_c(place)
    assert_explained(
        capsys, evaluate(finished_run, place), "has numbers for labels, and the classes of image_folder have none"
    )
    assert_explained(capsys, evaluate(cifar_model, place, "--sanity"), "--sanity and --corruptions are two evaluations")
    np.save(place / "fog.npy", np.zeros((30, 28, 28, 3), np.uint8))
    assert_explained(capsys, evaluate(cifar_model, place), "fog.npy is uint8 (30, 28, 28, 3), not uint8 (30, 32, 32, 3)")
    (place / "fog.npy").write_bytes((place / "snow.npy").read_bytes()[:1000])
    assert_explained(capsys, evaluate(cifar_model, place), "fog.npy cannot be read")
    np.save(place / "labels.npy", np.full(30, 10, np.uint8))
    (place / "fog.npy").unlink()
    assert_explained(capsys, evaluate(cifar_model, place), "label 10 of image 0 is outside 0..9")
    photos = {f"fog/{k}/n01/0.png": png(np.zeros((28, 28, 3), np.uint8)) for k in range(1, 5)}
    write_files(tmp_path / "photos", photos)
    assert_explained(capsys, evaluate(finished_run, tmp_path / "photos"), "lacks severities: it has 1, 2, 3, 4 of 1 to 5")
    write_files(tmp_path / "photos", {"fog/5/n01/0.png": photos["fog/1/n01/0.png"]})
    assert_explained(capsys, evaluate(finished_run, tmp_path / "photos"), "give images of the same classes")
