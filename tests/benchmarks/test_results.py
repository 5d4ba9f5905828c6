"""benchmarks/results: every file is in the table of its README, and the records say what the files hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fastrobust.config import reading

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
README = (RESULTS / "README.md").read_text()
RECORDS = (ROOT / "benchmarks/RECORDS.md").read_text()


def rows() -> list[list[str]]:
    lines = [line for line in README.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_file_is_in_the_table_once():
    named = [sorted(RESULTS.glob(row[0].strip(" `"))) for row in rows()]
    assert all(named), [row[0] for row, files in zip(rows(), named, strict=True) if not files]
    there = [file for file in RESULTS.rglob("*") if file.is_file() and file.suffix not in (".md", ".html", ".log")]
    there = [file for file in there if "gpu" not in file.relative_to(RESULTS).parts]  # the report of this machine
    assert sorted(file for files in named for file in files) == sorted(there)
    assert all(len(row) == 5 and all(row) for row in rows())


def test_no_file_holds_a_path_of_the_machine_that_made_it():
    """Headers of weights hold their run's config too."""
    for file in (file for file in RESULTS.rglob("*") if file.is_file()):
        found = re.search(rb'(/tmp/|/home/|/root/|\\?"(path|output|data)\\?": \\?"/)[^"]*', file.read_bytes())
        assert found is None, (file, found.group())


def test_links_of_the_table_lead_to_headings():
    for target, anchor in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", README):
        file = (RESULTS / target).resolve()
        assert file.exists(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, f"{target}#{anchor}"


def test_the_config_of_every_run_is_there():
    for name in set(re.findall(r"configs/[\w/]+\.yaml", README)):
        reading.load(ROOT / name)


def linked() -> list[tuple[str, dict]]:
    """(a line of a table of the records, what the file holds that it links to; as `[in]`, the verification in a run's)."""
    found = []
    for line in RECORDS.splitlines():
        for name in re.findall(r"\]\(results/([\w/.]+\.json)\)", line) if line.startswith("|") else ():
            content = json.loads((RESULTS / name).read_text())
            found.append((line, content["verified"] if "[in]" in line else content))
    return found


def test_accuracies_in_the_records_are_those_of_the_files():
    compared = 0
    for line, found in linked():
        summary = found.get("summary", found)
        told = [float(number) for number in re.findall(r"(\d+\.\d+) %", line)]
        evaluations = summary.get("evaluations", [])
        for evaluation in evaluations if "[both]" in line else evaluations[:1]:
            figure = 100 * evaluation["robust_accuracy"]
            near = [number for number in told if number == pytest.approx(figure, abs=0.051)]
            assert near or "collapsed" in line, (line, figure)
            compared += 1
    assert compared > 15


def test_verdicts_in_the_records_are_those_of_the_files():
    compared = 0
    for line, found in linked():
        if "verified_accuracy" not in found:
            continue
        numbers = {int(number.replace(",", "")) for number in re.findall(r"(?<![\d.,])\d[\d,]*(?![\d.])", line)}
        assert {found["verified"], found["falsified"], found["timeout"]} <= numbers, line
        share = f"{100 * found['verified_accuracy']:.2f}"
        assert share in line or share[:-1] in line or found["examples"] == 50, line
        compared += 1
    assert compared == 13


def test_ratios_in_the_records_are_those_of_the_files():
    step, epoch, attack = (json.loads((RESULTS / f"{name}_cpu.json").read_text()) for name in ("step", "epoch", "evaluate"))
    by_line = dict(re.findall(r"^\| [\d-]+ \| ([^|]+) \| ([\d.]+)[ ×]* \|.*results/\w+_cpu\.json", RECORDS, re.MULTILINE))
    figures = {
        "FGSM over standard": step["fgsm_over_standard"],
        "FGSM against the usual loop, eager": step["speedup_over_usual_loop"],
        "FGSM against the usual loop, compiled": step["fastest_speedup_over_usual_loop"],
        "an epoch of FGSM": epoch["speedup_over_usual_loop"],
        "PGD-50-10 on what is still robust": attack["speedup_over_plain"],
    }
    for words, figure in figures.items():
        (told,) = [value for line, value in by_line.items() if line.startswith(words)]
        assert float(told) == pytest.approx(figure, abs=0.0051), words
    loaders = json.loads((RESULTS / "loader_cpu.json").read_text())["rows"]
    for size, name, rate, ratio in re.findall(
        r"^\| (\w+ → \d+(?:, middle)?) \| ([^|]+?) \| ([\d,]+) \| ([\d.]+) \|", RECORDS, re.MULTILINE
    ):
        row = loaders[f"{size.replace('→', 'to')}, {name}"]
        assert float(rate.replace(",", "")) == pytest.approx(row["median"], abs=0.51)
        assert float(ratio) == pytest.approx(row["over_DataLoader"], abs=0.0051)
