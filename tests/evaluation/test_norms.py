"""Evaluation in the L2 norm: its own verdicts, kept apart from those in L-infinity, and told by name."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext

import pytest
import torch
from attack_runs import cheaper, few_images, make_cheap, run
from safetensors import safe_open

import fastrobust
from fastrobust.__main__ import main as cli
from fastrobust.attack.threat import L2
from fastrobust.attack.verdicts import correct, evaluating
from fastrobust.data.augment import to_unit
from fastrobust.evaluation import masking, results
from fastrobust.reporting import export, known
from fastrobust.reporting.known import Accuracy
from fastrobust.runtime.errors import RunError


@pytest.fixture
def copied(finished_run, tmp_path):
    """A copy without what other tests' evaluations have left in the run."""
    return shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns(results.FOLDER))


def evaluated(capsys, *arguments) -> tuple[dict, str]:
    assert cli(["evaluate", *map(str, arguments), "--device", "cpu", "--json"]) == 0
    text = capsys.readouterr().out
    return json.loads(text.splitlines()[-1]), text


def test_results_of_two_norms_are_kept_apart(copied, capsys):
    asked = [copied, "--epsilon", "0.1", "--attack", "pgd-5-1", "--limit", "40"]
    (linf, _), (l2, text) = evaluated(capsys, *asked), evaluated(capsys, *asked, "--norm", "l2")
    assert (linf["norm"], l2["norm"]) == ("linf", "l2") and "L2, epsilon 0.1" in text
    assert l2["robust_accuracy"] > linf["robust_accuracy"]  # a much smaller ball
    assert linf["worst_case"]["robust_accuracy"] == linf["robust_accuracy"]
    assert l2["worst_case"]["robust_accuracy"] == l2["robust_accuracy"]
    again, text = evaluated(capsys, *asked)  # out of the file
    assert again["robust_accuracy"] == linf["robust_accuracy"] and " pgd-5-1, epsilon 0.1, " in text
    records = results.read_all(copied / results.FOLDER)
    assert sorted(results.norm_of(r.settings) for r in records) == ["l2", "linf"]
    assert [("norm" in r.settings) for r in records if results.norm_of(r.settings) == "linf"] == [False]  # as ever
    with pytest.raises(ValueError, match="norms cannot be merged"):
        results.worst_case(records)


def test_card_and_page_tell_the_norm(copied, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "write_onnx", lambda *arguments: None)
    asked = [copied, "--epsilon", "1.5", "--attack", "pgd-5-1", "--limit", "40", "--norm", "l2"]
    found, _ = evaluated(capsys, *asked)
    digest = found["weights"]
    rows = [row for row in known.read(copied, digest).accuracies if row.norm == "l2"]
    about = {"norm": "l2", "alpha": 0.375, "images": found["images"]}
    assert rows == [Accuracy("pgd-5-1", 1.5, round(found["robust_accuracy"] * 40), 40, **about)]
    assert cli(["export", str(copied), "-o", str(tmp_path / "export")]) == 0
    assert "| pgd-5-1 | L2 1.5 | " in (tmp_path / "export" / "README.md").read_text()
    assert cli(["report", str(copied), "--limit", "0", "-o", str(tmp_path / "r.html")]) == 0
    assert "pgd-5-1, L2, epsilon 1.5" in (tmp_path / "r.html").read_text()


def test_a_run_in_l2_from_its_training_to_its_page(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "write_onnx", lambda *arguments: None)
    assert cli(["train", str(quick()), "norm=l2", "epsilon=1.5", "evaluation={steps: 3, restarts: 1, limit: 20}"]) == 0
    assert "L2, epsilon 1.5" in capsys.readouterr().out
    directory = tmp_path / "runs" / "bars"
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["norm"] == summary["evaluations"][0]["norm"] == "l2"
    found, _ = evaluated(capsys, directory)
    assert (found["norm"], found["epsilon"]) == ("l2", 1.5)
    assert found["robust_accuracy"] == summary["robust_accuracy"]
    assert cli(["export", str(directory), "-o", str(tmp_path / "export")]) == 0
    card = (tmp_path / "export" / "README.md").read_text()
    assert "adversarial examples at L2, epsilon 1.5." in card and "in the L2 norm over all pixels" in card
    assert cli(["report", str(directory), "--limit", "12", "-o", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "Images still classified correctly, L2<" in page and "under PGD-10 at L2, epsilon 1.5" in page
    for asked, words in (([], "not in l2; it was trained in it: --norm linf"), (["--norm", "l2"], "use --norm linf")):
        assert cli(["verify", str(directory), "--epsilon", "0.01", "--limit", "1", *asked]) != 0
        assert words in capsys.readouterr().err
    assert cli(["evaluate", str(directory), "--norm", "linf"]) != 0
    assert "--norm linf needs --epsilon: the run's own radius is of the norm l2" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["apgd-ce", "square"])
def test_autoattack_in_l2_finds_what_the_librarys_own_evaluation_finds(finished_run, part, monkeypatch):
    from pyautoattack import AutoAttack

    make_cheap(monkeypatch)
    model, data, epsilon = fastrobust.load(finished_run), few_images(), 1.5
    theirs = AutoAttack(model, attacks=[part], version="custom", eps=epsilon, norm="L2", seed=5)
    for attack in (theirs.apgd, theirs.apgd_targeted, theirs.fab, theirs.square):
        cheaper(attack)
    with evaluating(model):
        adversarial, _ = theirs.run_standard_evaluation(to_unit(data.images).contiguous(), data.labels, batch_size=60)
        expected = correct(model(adversarial), data.labels)
    record = run(model, data, [part], batch_size=60, seed=5, norm="l2", epsilon=epsilon)[0]
    assert torch.equal(record.clean & ~record.broken, expected)
    assert record.facts["refused"] == 0 and record.settings["norm"] == "l2"


def test_masking_checks_in_l2(finished_run, monkeypatch):
    for name, value in {"QUERIES": 50, "NOISY_POINTS": 4, "STEPS": 15, "RESTARTS": 1}.items():
        monkeypatch.setattr(masking, name, value)
    model, data = fastrobust.load(finished_run), few_images()
    checks = masking.check_all(model, data, norm="l2", epsilon=1.5, batch_size=60, surrogate=model)
    figures = {check.name: check.figures for check in checks}
    assert masking.verdict(checks) == "healthy", [check for check in checks if not check.passed]
    assert list(figures["growing epsilon"]["accuracy"])[-1] == pytest.approx(L2.widest((3, 28, 28)))
    assert figures["transfer"]["surrogate_fooled"] > 0.1


def test_test_sets_radii_and_saved_images_in_l2(copied, bars, capsys, tmp_path):
    common = [copied, "--attack", "pgd-5-1", "--limit", "40", "--norm", "l2"]
    rows, text = evaluated(capsys, *common, "--data", bars, "--epsilon", "0.5,1.5")
    assert re.search(r"^test images +n +L2, epsilon +clean", text, re.M)  # the heading of the table
    assert [(row["norm"], row["epsilon"]) for row in rows["evaluations"]] == [("l2", 0.5), ("l2", 1.5)]
    file = tmp_path / "images.safetensors"
    found, _ = evaluated(capsys, *common, "--epsilon", "1.5", "--save-images", file)
    assert found["robust_accuracy"] == rows["evaluations"][1]["robust_accuracy"]
    with safe_open(file, framework="pt") as stored:
        facts = json.loads(stored.metadata()["facts"])
        x, points, labels = (stored.get_tensor(name) for name in ("clean", "adversarial", "labels"))
    assert (facts["norm"], facts["epsilon"]) == ("l2", 1.5)
    lengths = (points - x).flatten(1).norm(dim=1)
    assert 1.4 < lengths.max() <= 1.5 + 1e-5 and points.min() >= 0 and points.max() <= 1
    assert (fastrobust.load(copied)(points).argmax(1) == labels).double().mean() == found["robust_accuracy"]


def test_checks_are_stored_by_norm_and_read_by_the_report(copied, capsys, monkeypatch):
    monkeypatch.setattr(masking, "check_all", lambda *a, **options: [masking.Check(options["norm"], True, "", {})])
    asked = [copied, "--epsilon", "0.1", "--attack", "pgd-1-1", "--limit", "20", "--sanity", "--transfer", copied]
    evaluated(capsys, *asked)
    digest = evaluated(capsys, *asked, "--norm", "l2")[0]["weights"]
    assert [(m.norm, m.epsilon) for m in known.read(copied, digest).masking] == [("linf", 0.1), ("l2", 0.1)]


def test_a_stored_radius_outside_the_box_is_damage(copied):
    file = copied / "summary.json"
    summary = json.loads(file.read_text())
    for norm, fits in (("l2", True), ("linf", False)):
        summary["evaluations"][0] |= {"epsilon": 1.5, "norm": norm}
        file.write_text(json.dumps(summary))
        with nullcontext() if fits else pytest.raises(RunError, match=r"damaged.*outside the pixel range"):
            known.read(copied, None)


def test_live_weights_are_evaluated_in_the_runs_norm(quick, tmp_path, capsys):
    words = ["norm=l2", "epsilon=1.5", "averaging={decay: 0.5}", "evaluation={steps: 1, restarts: 1, limit: 20}"]
    assert cli(["train", str(quick()), *words]) == 0
    assert "weights before averaging: pgd-1-1, L2, epsilon 1.5" in " ".join(capsys.readouterr().out.split())
    summary = json.loads((tmp_path / "runs" / "bars" / "summary.json").read_text())
    assert [e["norm"] for e in summary["evaluations"] + summary["evaluations_of_live_weights"]] == ["l2", "l2"]


def test_targeted_pgd_by_name(copied, capsys):
    asked = [copied, "--epsilon", "0.1", "--limit", "40", "--attack"]
    found, _ = evaluated(capsys, *asked, "pgd-t-5-1")
    plain, _ = evaluated(capsys, *asked, "pgd-5-1")
    assert found["robust_accuracy"] <= plain["robust_accuracy"] + 0.1 < 1
    assert found["alpha"] == 0.025 and "robust_accuracy_after_one_restart" not in found
