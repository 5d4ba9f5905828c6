"""What is said of the GPU report's results: also of those that are partial or garbage."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import gpu_probe, gpu_report, gpu_rows


def filled(value, nan: float):
    """A result whose every number is `nan`."""
    if isinstance(value, dict):
        return {key: filled(one, nan) for key, one in value.items()}
    if isinstance(value, list):
        return [filled(one, nan) for one in value]
    return nan if isinstance(value, float) else value


STORED = {
    "step": "step_cpu.json",
    "epoch": "epoch_cpu.json",
    "evaluate": "evaluate_cpu.json",
    "imagenet": "imagenet_cpu.json",
}


@pytest.mark.parametrize("kind", STORED)
def test_figures_of_stored_results_and_of_garbage(kind, tmp_path):
    result = json.loads((gpu_report.ROOT / "benchmarks/results" / STORED[kind]).read_text())
    folder = tmp_path / f"{kind}_some"
    gpu_probe.write(folder / "result.json", result)
    good = gpu_rows.figures(folder)
    assert len(good) > 1 and not any("cannot be read" in what or gpu_rows.NAN in value for what, value in good)
    gpu_probe.write(folder / "result.json", filled(result, math.nan))
    bad = gpu_rows.figures(folder)
    assert len(bad) == len(good) and any(gpu_rows.NAN in value for _, value in bad)
    for odd in ("{}", "[]", "3", "{half"):
        (folder / "result.json").write_text(odd)
        assert gpu_rows.figures(folder)


def test_figures_of_a_training(tmp_path):
    """A whole run; one whose figures are not numbers; one that was cut before its evaluation."""
    run = tmp_path / "train_0/seed0"
    summary = json.loads((gpu_report.ROOT / "benchmarks/results/fashion_mnist/quickstart_0.json").read_text())
    gpu_probe.write(run / "summary.json", summary)
    found = dict(gpu_rows.figures(run.parent))
    assert found["clean accuracy"] == f"{summary['clean_accuracy']:.2%}, n = 2,000"
    assert any(what.startswith("PGD-50-2") and "67.60%" in value and "n = 2,000" in value for what, value in found.items())
    gpu_probe.write(run / "summary.json", filled(summary, math.nan))
    (run / "metrics.jsonl").write_text('{"epoch": 1, "loss": null, "guard_accuracy": null, "seconds": NaN}\n{"epoch": 2, "s')
    said = gpu_rows.figures(run.parent)
    assert str(said).count(gpu_rows.NAN) > 3 and ("after epoch 1, the guard's minibatch, PGD", "none") in said
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").write_text('{"epoch": 1, "seconds": 2.5, "guard_accuracy": 0.5}\n')
    assert ("after epoch 1, the guard's minibatch, PGD", "50.00%") in gpu_rows.figures(run.parent)


TEST_LOGS = {
    "one process": """collected 127 items / 82 deselected / 4 selected

../../tests/test_gpu.py::test_a[x-1] PASSED         [  2%]
../../tests/test_gpu.py::test_a[torch from source] FAILED [  4%]
tests/test_b.py::test_b SKIPPED (why)    [ 50%]
tests/test_b.py::test_c """,
    "several": """2 workers [4 items]

../tests/test_gpu.py::test_a[x-1]
[gw0] [  2%] PASSED ../tests/test_gpu.py::test_a[x-1]
[gw1] [  4%] FAILED tests/test_gpu.py::test_a[torch from source]
[gw1] node down: Not properly terminated
[gw0] [ 50%] SKIPPED tests/test_b.py::test_b
../tests/test_b.py::test_c
""",
}


@pytest.mark.parametrize("log", TEST_LOGS)
def test_tests_are_counted_in_a_log_that_was_cut(log, tmp_path):
    name = "tests/test_gpu.py::test_a[torch from source]"
    expected = {"passed": 1, "skipped": 1, "failed": [name], "selected": 4}
    assert gpu_rows.counted(TEST_LOGS[log]) == expected
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/log.txt").write_text(f"{TEST_LOGS[log]}\nFAILED ../../{name} - AssertionError: 3")
    told = [("tests", "1 passed, 1 skipped, 1 failed, of 4"), ("failed", f"{name}: AssertionError: 3")]
    assert gpu_rows.figures(tmp_path / "tests") == told


def test_the_commit_of_the_same_code_is_told():
    assert gpu_rows.commit_of({"commit": "c1", "sources": "s"}, "s", "c2") == "c1"
    assert gpu_rows.commit_of({"commit": None, "sources": "s"}, "s", "c2") == "c2"
    assert gpu_rows.commit_of({"commit": None, "sources": "s"}, "other", "c2") == "code s"
