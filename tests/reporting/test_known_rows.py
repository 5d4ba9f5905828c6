"""The rows of known accuracies: what is counted, told once, and quoted as AutoAttack's in RobustBench's entry."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from run_files import digest

from fastrobust.evaluation import results
from fastrobust.models.weights import read_weights
from fastrobust.reporting import export, known
from fastrobust.reporting.known import Accuracy
from fastrobust.runtime.files import write_json


def write_autoattack(run, epsilon: float, n: int, given: str | None, **of) -> None:
    clean = torch.arange(n) % 10 > 0
    for attack in known.autoattack.PARTS:
        settings = {"attack": attack, "epsilon": epsilon, "examples": n, "data": f"{n} images", "weights": digest(run)}
        facts = {"settings": settings, "finished": True, "data": given} | of
        results.Record(facts, clean, clean.clone(), clean & (torch.arange(n) % 2 == 1)).save(run / results.FOLDER)


@pytest.mark.parametrize(
    "n, given, reported, quoted", [(200, None, True, True), (60, None, False, True), (200, "/x", True, False)]
)
def test_the_entry_quotes_results_on_the_same_images_alone(finished_run, tmp_path, n, given, reported, quoted):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / results.FOLDER).mkdir(exist_ok=True)
    write_autoattack(run, 0.1, n, given)
    entry, summary = (
        export.entry(read_weights(run)[1], known.read(run, digest(run))),
        json.loads((run / "summary.json").read_text()),
    )
    assert entry["reported"] == (f"{100 * summary['robust_accuracy']:.2f}" if reported else None)
    assert entry["autoattack_acc"] == ("40.00" if quoted else None)
    assert entry["footnote"] == f"Measured on {n} test images."


@pytest.mark.parametrize("same", [True, False])
def test_the_entry_puts_accuracies_on_other_images_side_by_side_with_none(finished_run, tmp_path, same):
    """As many test images: those of the summary, or others in their place. These count only where there is nothing else."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    if same:
        write_json(run / "summary.json", summary | {"test_images": "200 images"})
    write_autoattack(run, 0.1, 200, None, chosen="all")
    entry = export.entry(read_weights(run)[1], known.read(run, digest(run)))
    assert (entry["clean_acc"], entry["autoattack_acc"]) == ("90.00", "40.00")
    assert entry["reported"] == (f"{100 * summary['robust_accuracy']:.2f}" if same else None)
    write_autoattack(run, 0.3, 50, None, chosen="each class in proportion, evenly spaced")
    quoted = known.read(run, digest(run)).autoattack
    assert (quoted.examples, quoted.other) == ((200, False) if same else (50, False))


def test_of_several_results_of_autoattack_the_runs_own_radius_and_the_most_images_are_quoted(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / results.FOLDER).mkdir(exist_ok=True)
    for epsilon, n, given in ((0.3, 90, None), (0.1, 10, None), (0.1, 60, None), (0.1, 20, None), (0.1, 99, "/elsewhere")):
        write_autoattack(run, epsilon, n, given)
    found = known.read(run, digest(run))
    assert found.autoattack == Accuracy("autoattack", 0.1, 24, 60)
    assert found.autoattack_clean == 54 / 60
    quoted = [(row.epsilon, row.examples) for row in found.accuracies if row.attack == "autoattack"]
    assert sorted(quoted) == [(0.1, 10), (0.1, 20), (0.1, 60), (0.1, 99), (0.3, 90)]  # the table has all
    entry = export.entry(read_weights(run)[1], found)
    assert (entry["eps"], entry["autoattack_acc"], entry["clean_acc"]) == ("0.1", "40.00", "90.00")


@pytest.mark.parametrize("older", [False, True])
def test_what_the_summary_and_its_record_tell_is_told_once(finished_run, tmp_path, older):
    run = shutil.copytree(finished_run, tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    summary["evaluations"] = [{k: v for k, v in e.items() if k != "alpha" or not older} for e in summary["evaluations"]]
    write_json(run / "summary.json", summary)
    rows = [row for row in known.read(run, digest(run)).accuracies if row.examples == 200 and row.attack == "pgd-7-2"]
    assert {row.epsilon: row.alpha for row in rows} == {0.1: 0.025, 0.05: 0.0125} and len(rows) == 2


def test_the_interval_counts_undecided_images_either_way():
    row = Accuracy("exact verification", 0.1, 90, 100, 4)
    assert row.interval == (results.wilson(90, 100)[0], results.wilson(94, 100)[1])
    assert row.in_words() == "90.00% verified (90 of 100; 4 undecided)"
    assert Accuracy("pgd-1-1", 0.1, 90, 100).interval == results.wilson(90, 100)
    assert row.to_dict()["undecided"] == 4 and "undecided" not in Accuracy("pgd-1-1", 0.1, 90, 100).to_dict()


@pytest.mark.parametrize("robust, examples, undecided", [(5, 4, None), (-1, 4, None), (0, 0, None), (3, 4, 2), (3, 4, -1)])
def test_counts_that_cannot_be_are_refused(robust, examples, undecided):
    with pytest.raises(ValueError):
        Accuracy("pgd-1-1", 0.1, robust, examples, undecided)
