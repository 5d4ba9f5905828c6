"""Several test sets and radii in one command, and adversarial images in a file."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from run_files import assert_explained
from safetensors import safe_open

import fastrobust
from fastrobust.__main__ import main as cli
from fastrobust.attack.threat import Threat
from fastrobust.evaluation import images_file, results
from fastrobust.models.weights import weights_digest


@pytest.fixture
def run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "copied", ignore=shutil.ignore_patterns("evaluations"))


def evaluate(run, *words) -> int:
    return cli(["evaluate", str(run), "--attack", "pgd-3-1", "--batch-size", "50", *map(str, words)])


def found(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_every_set_at_every_radius_is_a_row(run, bars, few_bars, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "few").symlink_to(few_bars)
    sets = ["--data", "../few", "--data", bars, "--data", f"{bars}/"]  # the last is the second once more
    assert evaluate(run, *sets, "--epsilon", "0.02,0.1", "--json") == 0
    out = capsys.readouterr().out
    rows = json.loads(out.splitlines()[-1])["evaluations"]
    few = str(tmp_path / "few")
    assert [(row["data"], row["epsilon"], row["examples"]) for row in rows] == [
        (few, 0.02, 20), (few, 0.1, 20), (str(bars), 0.02, 200), (str(bars), 0.1, 200)
    ]  # fmt: skip
    assert len({row["images"] for row in rows}) == 2 and rows[0]["images"] == rows[1]["images"]
    table = out[out.index("worst case") :].splitlines()[1:-1]
    words = " ".join("".join(table).split())
    for row in rows:
        shares = " ".join(f"{row[key]:.2%}" for key in ("clean_accuracy", "robust_accuracy"))
        assert re.search(rf"{row['examples']} +{row['epsilon']:g} +{shares}", words.replace("  ", " ")), words
    kept = {(r.settings["data"], r.settings["epsilon"]): r.facts["data"] for r in results.read_all(run / results.FOLDER)}
    assert kept == {(row["images"], row["epsilon"]): row["data"] for row in rows}, "stored apart, with their digests"
    for row, (data, epsilon) in zip(rows, [("../few", 0.02), ("../few", 0.1), (bars, 0.02), (bars, 0.1)], strict=True):
        assert evaluate(run, "--data", data, "--epsilon", epsilon, "--fresh", "--json") == 0
        assert found(capsys)["robust_accuracy"] == row["robust_accuracy"], "as alone"


def test_what_is_wrong_with_the_last_set_is_said_before_the_first_is_attacked(run, bars, capsys, monkeypatch):
    monkeypatch.setattr("fastrobust.evaluation.command.run_attacks", None)
    assert_explained(capsys, evaluate(run, "--data", bars, "--data", run / "absent"), "image_folder was not found")


def test_checks_of_two_sets_are_kept_apart(run, bars, few_bars, capsys, monkeypatch):
    monkeypatch.setattr("fastrobust.evaluation.masking.check_all", lambda *a, **b: [])
    assert evaluate(run, "--data", bars, "--data", few_bars, "--sanity", "--transfer", run) == 0
    kept = [json.loads(file.read_text())["data"] for file in (run / results.FOLDER).glob("sanity_*.json")]
    assert sorted(kept) == sorted([str(bars), str(few_bars)])


def test_one_estimate_is_for_all_attacks_radii_and_sets(run, bars, few_bars, capsys, monkeypatch):
    monkeypatch.setattr("fastrobust.runtime.progress.PLAIN_FIRST", 0.0)
    monkeypatch.setattr("fastrobust.runtime.progress.PLAIN_INTERVAL", 0.0)
    words = ["--data", str(bars), "--data", str(few_bars), "--epsilon", "0.02,0.1", "--attack", "pgd-9-2,pgd-2-1"]
    assert cli(["evaluate", str(run), *words]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "; all: " in line]
    parts = [int(line.split()[0]) for line in lines]
    assert set(parts) == set(range(1, 9)) and parts == sorted(parts) and all(" of 8; all: " in line for line in lines)
    assert max(map(len, lines)) <= 80


# ---- --save-images


def read(file) -> tuple[dict, dict]:
    if file.suffix == ".npz":
        with np.load(file) as stored:  # without pickle
            arrays = {name: stored[name] for name in stored.files}
        return arrays, json.loads(str(arrays.pop("facts")))
    with safe_open(file, framework="np") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}, json.loads(stored.metadata()["facts"])  # noqa: SIM118


@pytest.mark.parametrize("kind", images_file.KINDS)
@pytest.mark.parametrize("limit", [[], ["--limit", "30"]])
def test_saved_images_give_the_accuracies_again(run, bars, tmp_path, capsys, kind, limit):
    file = tmp_path / f"some images{kind}"
    assert evaluate(run, "--epsilon", "0.1") == 0  # kept results do not leave the file empty
    assert evaluate(run, "--epsilon", "0.1", "--save-images", file, *limit, "--json") == 0
    told = found(capsys)
    arrays, facts = read(file)
    model = fastrobust.load(run)
    x, points, y = (torch.from_numpy(arrays[name]) for name in ("clean", "adversarial", "labels"))
    assert x.dtype == points.dtype == torch.float32 and len(y) == told["examples"] == (30 if limit else 200)
    with torch.no_grad():
        clean, adversarial = model(x).argmax(1), model(points).argmax(1)
    assert (clean == y).double().mean() == told["clean_accuracy"]
    assert (adversarial == y).double().mean() == told["robust_accuracy"] < told["clean_accuracy"]
    assert np.array_equal(clean, arrays["clean_prediction"])
    assert np.array_equal(adversarial, arrays["adversarial_prediction"])
    assert Threat(facts["epsilon"]).contains(points, x, 1e-7).all() and points.min() >= 0 and points.max() <= 1
    moved = (points != x).flatten(1).any(1)
    assert torch.equal(moved, (clean == y) & (adversarial != y)), "what is not broken is its own"
    whole = fastrobust_images(run)
    assert torch.equal(whole.images[arrays["numbers"]].float() / 255, x)
    assert torch.equal(whole.labels[arrays["numbers"]], y)
    assert (facts["attack"], facts["epsilon"], facts["norm"]) == ("pgd-3-1", 0.1, "linf")
    assert (facts["weights"], facts["images"]) == (weights_digest(model), told["images"])
    assert facts["classes"] == list(whole.classes)


def fastrobust_images(run):
    from fastrobust.evaluation.trained import open_trained

    return open_trained(run).images()


def test_images_of_every_attack_of_a_chain_are_in_the_file(run, tmp_path, capsys):
    file = tmp_path / "x.npz"
    arguments = [
        "evaluate",
        str(run),
        "--attack",
        "pgd-1-1,pgd-9-2",
        "--epsilon",
        "0.1",
        "--save-images",
        str(file),
        "--json",
    ]
    assert cli(arguments) == 0
    told = found(capsys)
    assert all(line["broken"] for line in told["attacks"])
    arrays, _ = read(file)
    assert (arrays["adversarial_prediction"] == arrays["labels"]).mean() == told["robust_accuracy"]


def test_logits_that_are_no_numbers_are_no_prediction():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    torch.nn.init.constant_(model[1].weight, float("inf"))
    x = torch.tensor([[0.0] * 4, [1.0] * 4]).view(2, 1, 2, 2)
    assert images_file.predictions(model, x, 1).tolist() == [-1, -1]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--save-images", "x.npy"], "must end in .npz or .safetensors"),
        (["--save-images", "absent/x.npz"], "there is no folder"),
        (["--save-images", "/proc/x.npz"], "/proc/x.npz cannot be written"),
        (["--save-images", "x.npz", "--epsilon", "0.1,0.2"], "one radius and one test set"),
    ],
)
def test_what_cannot_be_saved_is_said_first(run, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastrobust.evaluation.command.run_attacks", None)
    assert_explained(capsys, evaluate(run, *words), message)


def test_training_images_alone_lead_to_the_test_images_beside_them(run, bars, capsys):
    """The advice fits a run that is trained."""
    assert_explained(capsys, evaluate(run, "--data", bars / "train"), f"give {bars}, which has test images too.")


def test_too_little_memory_for_the_images_is_said_first(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastrobust.runtime.limits.available_memory", lambda: 10**6)
    assert_explained(capsys, evaluate(run, "--save-images", tmp_path / "x.npz"), "--limit")
    assert not (tmp_path / "x.npz").exists()


def test_an_interrupted_write_leaves_no_file_and_the_old_one(run, tmp_path, monkeypatch, capsys):
    file = tmp_path / "x.npz"
    file.write_bytes(b"old")

    def full(opened, **arrays):
        opened.write(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert_explained(capsys, evaluate(run, "--limit", "10", "--save-images", file), "No space left on device")
    assert file.read_bytes() == b"old" and {p.name for p in tmp_path.iterdir() if p.is_file()} == {"x.npz"}


def test_every_line_fits_80_columns(run, bars, tmp_path, capsys, monkeypatch):
    """Apart from paths."""
    monkeypatch.setenv("COLUMNS", "80")
    assert evaluate(run, "--sanity", "--transfer", run, "--limit", 40) == 0
    assert evaluate(run, "--epsilon", "0.1,0.05", "--limit", 40, "--data", bars, "--data", f"{bars}/../bars0") in (0, 2)
    lines = [line for line in capsys.readouterr().out.splitlines() if str(tmp_path) not in line]
    assert len(lines) > 20 and max(map(len, lines)) <= 80, max(lines, key=len)
