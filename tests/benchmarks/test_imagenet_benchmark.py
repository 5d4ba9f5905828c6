"""The ImageNet benchmark on a small network and tiny generated images: its figures belong together."""

import json
import re

import pytest
import torch
from data_files import prepare

from benchmarks import imagenet
from fastrobust.config import reading
from fastrobust.data import loaders

SMALL = ["model.name=preact_resnet18_w16", "phases.0.resize=24", "phases.0.resolution=16", "phases.1.resize=40"]
SMALL += ["phases.1.resolution=24", "phases.2.resolution=32", "device=cpu"]
CPU = torch.device("cpu")


@pytest.fixture
def no_data(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROBUST_DATA", str(tmp_path / "absent"))


def test_its_figures_belong_together(no_data, tmp_path, monkeypatch, capsys):
    arguments = ["imagenet", "--quick", "--device", "cpu", "--images", "10", "--batch-size", "6", *SMALL]
    monkeypatch.setattr("sys.argv", [*arguments, "--json", str(tmp_path / "out.json")])
    assert imagenet.main() == 0
    shown = capsys.readouterr().out
    result = json.loads(shown.splitlines()[-1])
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert {"versions", "hardware", "date", "commit"} <= result.keys() and result["precision"] == "fp32"
    assert "10 images, 10 of them distinct, of generated images" in result["images"]
    assert "batches of 6 in every phase instead of the config's" in result["hours_are"] and result["hours_are"] in shown

    names = {"torch"} | {name for name in ("ffcv", "dali") if loaders.available(name)}
    assert result["hours"].keys() == {"synthetic"} | names
    assert [(p["resize"], p["resolution"], p["passes"]) for p in result["phases"]] == [
        (24, 16, 6), (40, 24, 6), ("original", 32, 3),
    ]  # fmt: skip
    for phase in result["phases"]:
        assert phase["failed"] == {} and phase["batch_size"] == 6 and phase["engine"] == "eager"
        rates = phase["images_per_second"]
        assert rates.keys() == {"synthetic"} | names | {f"{name} alone" for name in names}
        assert all(0 < r["min"] <= r["median"] <= r["max"] for r in rates.values())
        for name, found in phase["limit"].items():
            assert found["limit"] == ("data" if found["loader_over_training"] < 1 else "compute")
            assert rates[f"{name} alone"]["min"] / rates["synthetic"]["max"] <= found["loader_over_training"] * 1.0001
            assert rates[f"{name} alone"]["max"] / rates["synthetic"]["min"] >= found["loader_over_training"] * 0.9999
    for name, hours in result["hours"].items():
        seconds = [1_281_167 * p["passes"] / p["images_per_second"][name]["median"] for p in result["phases"]]
        assert hours == pytest.approx(sum(seconds) / 3600)
    for facts in result["disk"].values():
        assert facts["gigabytes"] == pytest.approx(facts["bytes_per_image"] * 1_281_167 / 1e9)
    assert {"ffcv 24", "ffcv original", "dali 40"} <= result["disk"].keys()


def test_prepared_files_are_used_as_they_are(photos, tmp_path, monkeypatch, capsys):
    """No sample is written where the config finds files; one loader that fails is left out, the others go on."""

    sizes = ["--sizes", "24", "40", "original"]
    arguments = ["--data", str(photos), "--output", str(tmp_path / "image_folder-dali"), *sizes]
    assert prepare("webdataset", ["image_folder", *arguments]) == 0
    monkeypatch.setattr(imagenet, "write_sample", None)
    monkeypatch.setattr(loaders, "available", lambda name: name in ("dali", "torch"))  # whatever is installed
    monkeypatch.setattr(
        "fastrobust.data.loaders.dali.Dali.__init__", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no driver"))
    )
    small = ["data.dataset=image_folder", f"data.prepared={tmp_path / 'image_folder-dali'}", *SMALL]
    command = ["imagenet", "--quick", "--device", "cpu", "--batch-size", "6", "--repetitions", "1", *small]
    monkeypatch.setattr("sys.argv", command)
    assert imagenet.main() == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert result["images_per_pass"] == 37 and result["images"] == "the config's prepared files"
    assert result["hours"].keys() == {"synthetic", "torch"}
    assert all(phase["failed"] == {"dali": "no driver"} for phase in result["phases"])
    assert "warning: the loader dali failed and is left out: no driver" in printed.err
    files = sum(file.stat().st_size for file in (tmp_path / "image_folder-dali").glob("train_24*") if file.suffix != ".json")
    assert result["disk"]["dali 24"]["gigabytes"] == files / 1e9


def test_operations_of_a_step_are_five_forward_passes():
    """torchvision gives ResNet-50 4.09 GFLOPS at 224 pixels, counting a multiplication and an addition as one."""
    overrides = ["phases.1.batch_size=1", "precision=fp32", "device=cpu"]
    config = reading.load(imagenet.ROOT / "configs/imagenet_3phase.yaml", overrides)
    step, batch = imagenet.synthetic_step(config, 1, 1000, CPU)
    assert batch.images.shape == (1, 3, 224, 224)
    counted = imagenet.flops(step, batch)
    assert counted["forward"] == pytest.approx(2 * 4.09e9, rel=2e-3)
    assert counted["step"] / counted["forward"] == pytest.approx(5, abs=0.05)
    text = (imagenet.ROOT / "docs/scaling.md").read_text()
    assert f"{counted['forward'] / 1e9:.3f} GFLOP" in text and f"{counted['step'] / 1e9:.2f} GFLOP" in text


def test_hours_are_images_by_passes_over_rates():
    def phase(passes: int, **rates: float) -> dict:
        return {"passes": passes, "images_per_second": {name.replace("_", " "): {"median": r} for name, r in rates.items()}}

    phases = [phase(6, synthetic=100, ffcv_alone=900, ffcv=50, dali=1), phase(3, synthetic=10, ffcv_alone=900, ffcv=10)]
    assert imagenet.project(phases, 3600) == {"synthetic": 6 / 100 + 3 / 10, "ffcv": 6 / 50 + 3 / 10}


def test_the_table_of_assumed_rates_in_the_documentation():
    """R / S images a second, and the hours of 6, 6 and 3 epochs."""
    text = (imagenet.ROOT / "docs/scaling.md").read_text()
    step = [
        float(cell) for cell in re.search(r"FGSM, S \| ([\d.]+) GFLOP \| ([\d.]+) GFLOP \| ([\d.]+) GFLOP", text).groups()
    ]
    rows = re.findall(r"^\| (\d+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) h \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for assumed, *rates, hours in rows:
        exact = [float(assumed) * 1e3 / s for s in step]
        assert [float(r.replace(",", "")) for r in rates] == pytest.approx(exact, rel=5e-3)
        phases = [{"passes": n, "images_per_second": {"x": {"median": r}}} for n, r in zip((6, 6, 3), exact, strict=True)]
        assert float(hours) == pytest.approx(imagenet.project(phases, imagenet.IMAGES)["x"], rel=2e-2)
