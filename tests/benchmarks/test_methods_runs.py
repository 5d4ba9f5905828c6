"""The comparison of training methods on tiny data: how runs are kept, resumed and put together, and what a step costs."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from method_results import write

from benchmarks import method_costs, methods
from benchmarks import method_setting as setting
from fastrobust.evaluation.from_python import evaluate
from fastrobust.evaluation.trained import open_trained
from fastrobust.train.training import Training

ROOT = Path(__file__).parents[2]
SCALES = list(setting.FILES)


def test_without_autoattacks_package_nothing_is_trained(monkeypatch, tmp_path, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(methods, "run", lambda *job: pytest.fail("trained"))
    assert methods.main(["--scale", "small", "--results", str(tmp_path)]) == 2
    assert "pip install 'pyautoattack>=" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*"))


@pytest.fixture
def tiny(config_file, few_bars, tmp_path, monkeypatch):
    """The small scale is that of quick runs of four steps; AutoAttack is its first part."""
    changes = {"data__path": str(few_bars), "phases": [{"epochs": 2, "batch_size": 35, "resolution": 28}], "epsilon": 0.1}
    changes |= {
        "data__limit": 70,
        "data__channels": 3,  # as in the settings of both scales, a run finds out no key of these by itself
        "evaluation": {"steps": 2, "restarts": 1},
        "guard": {"action": "warn"},
        "label_smoothing": 0.1,
    }
    monkeypatch.setitem(setting.FILES, "small", str(config_file(tmp_path, **changes)))
    monkeypatch.setattr(methods, "ATTACK", "apgd-ce")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments) -> int:
    return methods.main(["--scale", "small", "--device", "cpu", "--methods", "fgsm", "standard", *arguments])


def content(file: Path) -> dict:
    """What a result says that does not depend on when it was trained."""
    found = json.loads(file.read_text())
    for key in ("train_seconds", "history", "hardware", "trained"):
        del found[key]
    del found["pgd"]["seconds"], found["autoattack"]["seconds"]
    return found


def test_runs_are_trained_attacked_kept_and_told(tiny, few_bars, capsys):
    assert call() == 0
    out = capsys.readouterr().out
    begun = [line for line in out.splitlines() if line.startswith("[")]
    assert begun == ["[1/3] fgsm_2epochs_seed0", "[2/3] standard_2epochs_seed0", "[3/3] standard_3epochs_seed0"]
    files = {file.stem: json.loads(file.read_text()) for file in Path("runs/methods/results/small").iterdir()}
    assert files.keys() == {"fgsm_2epochs_seed0", "standard_2epochs_seed0", "standard_3epochs_seed0"}
    fgsm = files["fgsm_2epochs_seed0"]
    assert (fgsm["schedules"], fgsm["cost"]) == (["equal epochs", "equal cost"], pytest.approx(2 * 5 / 3))
    assert (
        files["standard_3epochs_seed0"]["schedules"] == ["equal cost"] and fgsm["data"] == f"image_folder ({few_bars.name})"
    )
    for name, found in files.items():
        trained = open_trained(f"runs/methods/small/{name}")
        test = trained.images()
        assert (found["weights"], found["images"], found["examples"]) == (trained.digest, test.checksum(), 20)
        for key, attack in (("pgd", "pgd-2-1"), ("autoattack", "apgd-ce")):
            one = evaluate(trained.model, test.images, test.labels, epsilon=0.1, attack=attack, batch_size=500)
            assert found[key]["robust_accuracy"] == one.robust_accuracy and found["clean_accuracy"] == one.clean_accuracy
            assert f"| {100 * one.robust_accuracy:.1f} |" in out

    shutil.rmtree("runs/methods/small")  # the results are files: nothing is trained again
    assert call() == 0
    assert "[1/" not in capsys.readouterr().out and not Path("runs/methods/small").exists()


def test_what_was_stopped_goes_on_to_the_same_weights(tiny, capsys, monkeypatch):
    """A training is stopped by the clock within its second epoch, and goes on; another is never stopped."""
    real = Training._guard

    end = time.monotonic() + 3

    def slow(self, *arguments):
        while time.monotonic() < end + 0.5:
            time.sleep(0.1)
        return real(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "_guard", slow)
        assert call("--minutes", "0.05") == 1
    out = capsys.readouterr().out
    assert "open: fgsm_2epochs_seed0: stopped by SIGTERM" in out and "open: standard_3epochs_seed0: no time left" in out
    run = Path("runs/methods/small/fgsm_2epochs_seed0")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1 and not (run / "summary.json").exists()
    assert call("--methods", "fgsm") == 0
    assert "going on after 2 updates" in capsys.readouterr().out
    results = Path("runs/methods/results/small/fgsm_2epochs_seed0.json")
    stopped = content(results)
    shutil.rmtree("runs")
    assert call("--methods", "fgsm") == 0
    assert content(results) == stopped


def test_an_attack_that_was_stopped_goes_on(tiny, capsys, monkeypatch):
    """After the training is finished and PGD has run; what has run is not run again."""
    calls = []

    def interrupted(*arguments, **options):
        calls.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(methods, "run_attacks", interrupted)
        assert call("--methods", "fgsm") == 130
    run = Path("runs/methods/small/fgsm_2epochs_seed0")
    trained = (run / "summary.json").stat().st_mtime_ns
    assert calls and not Path("runs/methods/results/small/fgsm_2epochs_seed0.json").exists()
    assert call("--methods", "fgsm") == 0
    assert (run / "summary.json").stat().st_mtime_ns == trained


def test_folders_of_several_machines_are_put_together(tiny, capsys):
    """Seeds 0 and 1 in one folder, or in two: the same tables, and nothing is trained twice."""
    assert call("--methods", "fgsm", "--seeds", "2", "--results", "both") == 0
    whole = capsys.readouterr().out
    for folder, seed in (("a", 0), ("b", 1)):
        Path(folder, "small").mkdir(parents=True)
        for file in Path("both/small").glob(f"*_seed{seed}.json"):
            shutil.copy(file, f"{folder}/small")
    shutil.rmtree("runs")
    assert call("--methods", "fgsm", "--seeds", "2", "--results", "a", "b") == 0
    out = capsys.readouterr().out
    assert "[1/" not in out and not Path("runs").exists()
    shown = lambda text: [line for line in text.splitlines() if line.startswith("|")]
    assert shown(out) == shown(whole) and any("0, 1" in line for line in shown(out))
    assert len(list(Path("a/small").iterdir())) == 1  # the others' files stay where they are


def test_test_images_that_changed_are_noticed(tiny, few_bars, capsys, monkeypatch):
    """Between PGD, at the end of the training, and AutoAttack."""
    other = shutil.copytree(few_bars, tiny / "bars")
    with monkeypatch.context() as patched:
        patched.setattr(methods, "run_attacks", lambda *a, **b: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call("--methods", "fgsm", "--data", str(other)) == 130
    for file in (other / "test").rglob("*3.png"):
        file.unlink()
    assert call("--methods", "fgsm", "--data", str(other)) == 1
    assert "open: fgsm_2epochs_seed0:" in capsys.readouterr().out
    assert not Path("runs/methods/results/small/fgsm_2epochs_seed0.json").exists()


def test_costs_are_measured_in_turn(tiny, capsys, monkeypatch):
    monkeypatch.setattr(method_costs, "REPETITIONS", 5)
    real, asked = method_costs.peak_of, []
    monkeypatch.setattr(method_costs, "peak_of", lambda config, device: asked.append(config) or 5_000_000)
    assert call("--costs") == 0
    (file,) = Path("runs/methods/results/small").glob("costs_*.json")
    found = json.loads(file.read_text())
    fgsm, standard = found["methods"]["fgsm"], found["methods"]["standard"]
    assert fgsm["over_fgsm"] == 1 and 0.2 < standard["over_fgsm"] < 1 and fgsm["peak_memory"] == 5_000_000
    assert "No run yet" in Path("runs/methods/results/small.html").read_text()
    usual, _ = asked
    weights = 4 * 166_406  # bytes of the MNIST network, of 3 channels; Adam keeps two more of them, and there is a gradient
    assert 4 * weights < real(usual, "cpu") < 100e6


MEMORY = """
import torch
from benchmarks.method_costs import memory_of_process
before = memory_of_process(reset=True)
held = torch.ones(25_000_000)
del held
print(memory_of_process() - before, memory_of_process(reset=True) - before)
"""


def test_memory_is_the_most_that_is_held_at_once():
    """In a process of its own: here other tests' memory may be given back meanwhile."""
    said = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    most, left = map(int, said.split())
    assert 99e6 < most < 110e6 and left < 50e6


@pytest.mark.parametrize(
    "arguments, word", [(["--methods", "fgms"], "fgms"), (["--minutes", "0"], "minutes"), (["--minutes", "-1"], "minutes")]
)
def test_mistakes_are_explained(tiny, capsys, arguments, word):
    assert call(*arguments) == 2
    assert word in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_result_of_another_setting_is_neither_counted_nor_written_over(tiny, capsys):
    Path("results/small").mkdir(parents=True)
    write(Path("results/small"), "fgsm", 0.9, config=setting.base("small", "fgsm", ("epsilon=0.03",)).to_dict())
    (file,) = Path("results/small").iterdir()
    before = file.read_bytes()
    assert call("--methods", "fgsm", "--results", "results") == 1
    out = capsys.readouterr().out
    assert f"open: {file.stem}: {file} is of another setting" in out and f"left out, of another setting: {file}" in out
    assert file.read_bytes() == before and not Path("runs").exists()


def test_a_damaged_result_is_named(tiny, capsys):
    Path("results/small").mkdir(parents=True)
    Path("results/small/fgsm_2epochs_seed0.json").write_text("{}")
    assert call("--results", "results") == 2
    assert "fgsm_2epochs_seed0.json" in capsys.readouterr().err
