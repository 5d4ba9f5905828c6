"""The record: what is trained, how runs are kept and go on, and what the table says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import paper, reproduce, speedrun
from fastrobust.config import reading
from fastrobust.evaluation.from_python import evaluate
from fastrobust.evaluation.trained import open_trained
from fastrobust.train import work
from fastrobust.train.training import Training

CONFIG = paper.ROOT / "configs/cifar10_speedrun.yaml"


class Images:
    """What the counter asks of CIFAR-10's loader."""

    channels, classes, crops = 3, tuple("0123456789"), False

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count


def test_the_config_is_the_goals():
    """All training images but those held out, and an evaluation by PGD-50-10 at 8/255 on all test images."""
    c = reading.load(CONFIG)
    assert (c.data.dataset, c.data.limit, c.data.held_out) == ("cifar10", None, 2000)
    e = c.evaluation
    assert (e.epsilon, e.alpha, e.steps, e.restarts, e.limit) == ((8 / 255,), (2 / 255,), 50, 10, None)
    assert c.model.weights is None and c.precision == "auto"


def test_the_config_says_its_work():
    """Its head has the counted operations, and they are within the goal."""
    c, images = reading.load(CONFIG), Images(48000)
    each = work.of_steps(c, images)
    total = sum(n * work_steps for n, work_steps in zip(each, steps(c, len(images)), strict=True)) / 1e15
    assert total <= 0.4
    assert f"{total:.3f} PFLOP" in CONFIG.read_text()


def steps(config, examples: int) -> list[int]:
    """Batches of each phase, the last filled up."""
    return [-(-config.passes(phase) * examples // phase.batch_size) for phase in config.phases]


@pytest.fixture
def tiny(config_file, few_bars, tmp_path, monkeypatch):
    """The record's config is that of quick runs of four steps."""
    changes = {"data__path": str(few_bars), "phases": [{"epochs": 2, "batch_size": 35, "resolution": 28}]}
    changes |= {"epsilon": 0.1, "data__channels": 3, "evaluation": {"steps": 2, "restarts": 2}}
    file = config_file(tmp_path, **changes)
    monkeypatch.setattr(speedrun, "ROW", paper.Row("tiny", "tiny", str(file)))
    monkeypatch.chdir(tmp_path)
    return file


def call(*arguments) -> int:
    return speedrun.main(["--device", "cpu", *arguments])


def table(out: str) -> list[dict[str, str]]:
    """The rows of a printed table, by their heads."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    return [dict(zip(speedrun.HEAD, row, strict=True)) for row in cells[2:]]


def test_seeds_are_trained_attacked_kept_and_told(tiny, capsys):
    assert call("--seeds", "2", "--results", "results") == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("[")] == ["[1/2] seed 0", "[2/2] seed 1"]
    robust, pflop = [], []
    for seed in (0, 1):
        found = json.loads(Path(f"results/tiny_seed{seed}.json").read_text())
        trained = open_trained(f"runs/reproduce/speedrun/tiny_seed{seed}")
        test = trained.images()
        one = evaluate(trained.model, test.images, test.labels, epsilon=0.1, attack="pgd-2-2", batch_size=500)
        assert found["summary"]["evaluations"][0]["robust_accuracy"] == one.robust_accuracy
        assert found["config"]["seed"] == seed
        robust.append(one.robust_accuracy)
        pflop.append(found["summary"]["train_pflop"])
    (row,) = table(out)
    mean = 100 * sum(robust) / 2
    assert row["PGD %"] == f"{mean:.2f} ({100 * robust[0]:.2f}, {100 * robust[1]:.2f})" and row["seeds"] == "0, 1"
    assert pflop[0] == pflop[1] > 0 and row["PFLOP"] == f"{pflop[0]:.3f}"
    assert row["45%"] == ("reached" if mean >= 45 else "missed")

    shutil.rmtree("runs")  # the results are files: nothing is trained again
    assert call("--seeds", "2", "--results", "results") == 0
    assert table(capsys.readouterr().out) == [row] and not Path("runs").exists()


def test_what_was_stopped_goes_on(tiny, capsys, monkeypatch):
    """By Ctrl-C after the first epoch, to the weights of a run that was never stopped."""
    real = Training._guard

    def stopped(self, *arguments):
        real(self, *arguments)
        raise KeyboardInterrupt

    weights = lambda: open_trained("runs/reproduce/speedrun/tiny_seed0").digest
    with monkeypatch.context() as patched:
        patched.setattr(Training, "_guard", stopped)
        assert call("--seeds", "1") == 130
    assert not list(Path("runs/reproduce/speedrun").glob("results/*"))
    assert call("--seeds", "1") == 0
    resumed = weights()
    shutil.rmtree("runs")
    assert call("--seeds", "1") == 0
    assert weights() == resumed


def test_an_earlier_record_stays_in_the_table(tiny, capsys):
    """A config that changed is another row, and does not overwrite what was measured."""
    assert call("--seeds", "1", "--results", "results") == 0
    before = Path("results/tiny_seed0.json").read_bytes()
    tiny.write_text(tiny.read_text().replace("restarts: 2", "restarts: 1"))
    assert call("--seeds", "1", "--results", "results") == 1
    out = capsys.readouterr().out
    assert "open: seed 0: results/tiny_seed0.json is of another setting" in out
    assert Path("results/tiny_seed0.json").read_bytes() == before
    Path("results/tiny_seed0.json").rename("results/earlier_seed0.json")
    shutil.rmtree("runs")
    assert call("--seeds", "1", "--results", "results") == 0
    assert len(table(capsys.readouterr().out)) == 2


def test_the_goal_is_met_by_the_mean(tiny, tmp_path, capsys):
    """Of made-up files: 44.8 and 45.3 % are 45.05 %; the interval is the mean of theirs."""
    config = reproduce.config_of(speedrun.ROW, 0, "speedrun", "cpu", None).to_dict()
    Path("results").mkdir()
    for seed, robust in enumerate((0.448, 0.453)):
        one = {"epsilon": 0.1, "attack": "pgd-50-10", "examples": 10000, "robust_accuracy": robust}
        one["robust_interval"] = [robust - 0.01, robust + 0.012]
        summary = {"evaluations": [one], "clean_accuracy": 0.7, "train_seconds": 100 + 20 * seed, "train_pflop": 0.25}
        summary |= {"hardware": {"device": "CPU", "cpu": "CPU", "threads": 1}, "dataset": "cifar10"}
        stored = {"row": "tiny", "date": f"2026-11-2{seed}", "config": config | {"seed": seed}, "summary": summary}
        Path(f"results/tiny_seed{seed}.json").write_text(json.dumps(stored | {"history": [], "data": "cifar10 (x)"}))
    assert call("--show", "--results", "results") == 0
    (row,) = table(out := capsys.readouterr().out)
    assert row["PGD %"] == "45.05 (44.80, 45.30)" and row["45%"] == "reached" and row["PFLOP"] == "0.250"
    assert row["95 % interval"] == "44.0 to 46.2" and row["date"] == "2026-11-20" and "n = 10,000" in out


def test_without_a_run_the_table_says_so(tmp_path, capsys):
    assert call("--show", "--results", str(tmp_path)) == 0
    assert "No run yet" in capsys.readouterr().out
