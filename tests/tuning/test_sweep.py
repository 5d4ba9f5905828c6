"""Sweeps: the grid, resuming, schedulers, and the table against the runs' own files."""

from __future__ import annotations

import csv
import json
import os
import re
import statistics

import pytest
import yaml

from fastrobust.__main__ import main as cli
from fastrobust.models.weights import read_weights
from fastrobust.train import start
from fastrobust.tuning import sweep


@pytest.fixture
def sweep_file(config_file, few_bars, tmp_path):
    """sweep_file(stem, **changes) -> a sweep of four quick runs in tmp_path/runs/grid: two learning rates, two seeds."""

    def make(stem: str = "grid", **changes):
        quick = {"data__path": str(few_bars), "phases": [{"epochs": 1, "batch_size": 35, "resolution": 28}]}
        base = config_file(tmp_path, evaluation={"steps": 2, "restarts": 1}, **quick)
        content = {
            "config": str(base),
            "output": str(tmp_path / "runs"),
            "set": {"data.limit": 70},
            "grid": {"schedule.max_lr": [0.001, 0.01]},
            "seeds": 2,
        } | changes
        file = tmp_path / f"{stem}.yaml"
        file.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))  # its keys are sorted
        return file

    return make


def state(directory):
    return {file: file.stat().st_mtime_ns for file in sorted(directory.rglob("*")) if file.is_file()}


def test_the_grid_is_every_combination(sweep_file, tmp_path):
    grid = {
        "method": {
            "fgsm": {"method.alpha": "10/255"},
            "pgd": {"method": {"name": "pgd", "steps": 2, "alpha": 0.02}, "schedule.max_lr": 0.5},
        },
        "phases.0.epochs": [1, 2, 5],
        "epsilon": ["4/255"],
    }
    found = sweep.points(sweep.read_sweep(sweep_file(grid=grid, seeds=[3, 8])))
    assert len(found) == 2 * 3 * 1 * 2
    assert len({p.config.name for p in found}) == len(found)
    for point in found:
        labels, c = dict(point.labels), point.config
        assert c.seed == point.seed and c.data.limit == 70
        assert c.phases[0].epochs == int(labels["phases.0.epochs"])
        assert c.epsilon == pytest.approx(4 / 255)
        assert c.method.name == labels["method"]
        assert c.schedule.max_lr == (0.5 if labels["method"] == "pgd" else 0.005)
        assert point.directory.parent == tmp_path / "runs" / "grid"
    assert found[0].config.method.alpha == pytest.approx(10 / 255)
    assert found[0].config.name == "epsilon-4-255_method-fgsm_epochs-1_seed-3"


def test_a_sweep_trains_and_tells(sweep_file, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    file, directory = sweep_file(), tmp_path / "runs" / "grid"
    assert cli(["sweep", str(file), "--dry-run"]) == 0
    assert "4 runs, 4 of them open" in capsys.readouterr().out and not directory.exists()
    assert cli(["sweep", str(file)]) == 0
    out = capsys.readouterr().out
    summaries = {}
    for lr in ("0.001", "0.01"):
        for seed in (0, 1):
            one = directory / f"max_lr-{lr}_seed-{seed}"
            summaries[lr, seed] = json.loads((one / "summary.json").read_text())
            assert yaml.safe_load((one / "config.yaml").read_text())["schedule"]["max_lr"] == float(lr)
            assert summaries[lr, seed]["seed"] == seed
    rows = list(csv.DictReader((directory / "results.csv").open()))
    assert [(r["schedule.max_lr"], int(r["seed"])) for r in rows] == list(summaries)
    for row in rows:
        summary = summaries[row["schedule.max_lr"], int(row["seed"])]
        assert float(row["robust_accuracy"]) == summary["robust_accuracy"]
        assert float(row["clean_accuracy"]) == summary["clean_accuracy"] and row["examples"] == "20"
    page = (directory / "results.html").read_text()
    for lr in ("0.001", "0.01"):
        values = [summaries[lr, seed]["robust_accuracy"] for seed in (0, 1)]
        cell = f"{statistics.fmean(values):.2%} ({min(values) * 100:.2f} to {max(values) * 100:.2f})"
        assert cell.replace(" (", " <small>(") in page and cell in out
    assert "4 of 4 runs are finished" in page and "pgd-2-1, epsilon 0.05, n = 20" in page and "epsilon 0.05" in out
    assert page.count("<figure>") == 2

    before = state(directory)  # again: nothing is trained, and the results are the same
    content = (directory / "results.csv").read_text(), page
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    assert cli(["sweep", str(file)]) == 0
    assert max(len(line) for line in capsys.readouterr().out.splitlines() if line.startswith("│")) == 80
    after = state(directory)
    changed = {f.name for f in after if before.get(f) != after[f]}
    assert changed <= {"results.csv", "results.html"}
    assert ((directory / "results.csv").read_text(), (directory / "results.html").read_text()) == content


def test_an_interrupted_sweep_goes_on(sweep_file, tmp_path, monkeypatch, capsys):
    """Stopped in its second run after an epoch's checkpoint: the first is left alone, the second resumes, and all give the
    weights of a sweep that was not stopped."""
    whole = tmp_path / "runs" / "whole"
    assert cli(["sweep", str(sweep_file("whole"))]) == 0
    file, directory = sweep_file(), tmp_path / "runs" / "grid"
    real, calls = start.finish, []

    def stops(job):
        calls.append(job.learner.updates.item())
        if len(calls) == 2:
            job.train()
            raise KeyboardInterrupt
        return real(job)

    monkeypatch.setattr(start, "finish", stops)
    assert cli(["sweep", str(file)]) == 130
    assert capsys.readouterr().err.endswith("stopped by the keyboard; the same command goes on with the sweep\n")
    assert (directory / "max_lr-0.001_seed-0" / "summary.json").exists()
    assert not (directory / "max_lr-0.001_seed-1" / "summary.json").exists()
    first = state(directory / "max_lr-0.001_seed-0")
    assert cli(["sweep", str(file)]) == 0
    assert calls == [0, 0, 2, 0, 0]  # the second went on after its two updates
    assert state(directory / "max_lr-0.001_seed-0") == first
    for one in whole.iterdir():
        if one.is_dir():
            a, b = (read_weights(d / one.name)[0].state_dict() for d in (whole, directory))
            assert all((a[k] == b[k]).all() for k in a)


def test_a_run_that_fails_does_not_stop_the_others(sweep_file, tmp_path, capsys):
    file = sweep_file(grid={"optimizer": {"wild": {"schedule.max_lr": 1e30}, "fine": {}}}, seeds=1)
    assert cli(["sweep", str(file)]) == 1
    captured = capsys.readouterr()
    assert "optimizer-wild_seed-0" in captured.err and "loss" in captured.err
    rows = list(csv.DictReader((tmp_path / "runs" / "grid" / "results.csv").open()))
    assert [row["optimizer"] for row in rows] == ["fine"]


def test_a_radius_of_training_and_one_of_evaluation_have_columns_of_their_own(sweep_file, tmp_path):
    grid = {"epsilon": [0.05], "evaluation.epsilon": [0.1], "norm": ["linf"]}
    assert cli(["sweep", str(sweep_file(seeds=1, grid=grid))]) == 0
    head, row = csv.reader((tmp_path / "runs" / "grid" / "results.csv").open())
    assert len(set(head)) == len(head)
    found = dict(zip(head, row, strict=True))
    assert [found[key] for key in (*grid, "attack_norm", "attack_epsilon")] == ["0.05", "0.1", "linf", "linf", "0.1"]


def test_a_sweep_at_home(sweep_file, tmp_path, monkeypatch):
    """Its results lie beside its runs, not in a folder called `~`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = sweep.read_sweep(sweep_file(output="~/sw", seeds=1, grid={"epsilon": [0.1]}))
    assert found.directory == tmp_path / "home/sw/grid" == sweep.points(found)[0].directory.parent


def test_a_section_may_be_set_for_all_and_a_key_of_it_on_the_grid(sweep_file):
    file = sweep_file(set={"method": {"name": "pgd", "steps": 3}}, grid={"method.alpha": [0.02]}, seeds=1)
    method = sweep.points(sweep.read_sweep(file))[0].config.method
    assert (method.name, method.steps, method.alpha) == ("pgd", 3, 0.02)


def test_another_config_in_its_place_is_refused(sweep_file, tmp_path, capsys):
    file = sweep_file(seeds=1, grid={"schedule.max_lr": [0.001]})
    assert cli(["sweep", str(file)]) == 0
    (tmp_path / "runs" / "grid" / "max_lr-0.001_seed-0" / "summary.json").unlink()
    assert cli(["sweep", str(sweep_file(seeds=1, grid={"schedule.max_lr": [0.001]}, set={"data.limit": 50}))]) == 1
    assert "data.limit" in capsys.readouterr().err


def test_finished_runs_are_shown_under_their_own_settings_alone(sweep_file, tmp_path, capsys):
    """A point is a finished run of its config, not a folder that has its name."""
    grid, directory = {"epsilon": [0.1]}, tmp_path / "runs" / "grid"
    assert cli(["sweep", str(sweep_file(seeds=1, grid=grid))]) == 0
    before = state(directory)
    for more in ([], ["--dry-run"]):
        assert cli(["sweep", str(sweep_file(seeds=2, grid=grid, set={"data.limit": 50})), *more]) == 2
        told = capsys.readouterr().err
        assert "epsilon-0.1_seed-0" in told and "data.limit: 70 in the run, 50 in the sweep" in told and "name:" in told
        assert state(directory) == before
    changed = {"data.limit": 70, "evaluation.steps": 3, "device": "cpu", "data.workers": 1}  # what a run may change
    assert cli(["sweep", str(sweep_file(seeds=1, grid=grid, set=changed))]) == 0
    told = capsys.readouterr().out
    assert "evaluation.steps: 2 in the run, 3 in the sweep" in told and "device" not in told and "workers" not in told


def test_accuracies_under_other_attacks_are_not_averaged(sweep_file, tmp_path, monkeypatch):
    """Runs that are there keep the radius with which they were evaluated."""
    for seeds, epsilon in ((1, 0.05), (2, 0.002)):
        assert cli(["sweep", str(sweep_file(seeds=seeds, set={"data.limit": 70, "evaluation.epsilon": epsilon}))]) == 0
    results = sweep.gather(sweep.points(sweep.read_sweep(tmp_path / "grid.yaml")))
    head, rows = sweep.rows_of(results)
    told = [(row[head.index("seeds")], row[head.index("attack")]) for row in rows]
    assert told == [("1", "pgd-2-1, epsilon 0.05, n = 20"), ("1", "pgd-2-1, epsilon 0.002, n = 20")] * 2
    drawn = []
    monkeypatch.setattr(sweep, "chart", lambda title, lines, **options: drawn.append([line.label for line in lines]) or "")
    sweep.figures(results)
    assert drawn == [["all, pgd-2-1, epsilon 0.05, n = 20", "all, pgd-2-1, epsilon 0.002, n = 20"]] * 2


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"config": None}, "grid.yaml names no `config:`"),
        ({"gird": {}}, "unknown key 'gird'; did you mean 'grid'?"),
        ({"seed": 2}, "unknown key 'seed'; did you mean 'seeds'?"),
        ({"epsilon": 0.1}, "unknown key 'epsilon'; the keys there are: name, config, output, set, grid, grids, seeds"),
        ({"set": 3}, "set: input should be a valid section, got 3"),
        ({"seeds": 0}, "seeds"),
        ({"grid": {"epsilon": []}}, "grid.epsilon"),
        ({"grid": {"epsilom": [0.1]}}, "epsilom"),
        ({"grid": {"epsilon": [0.1, 0.1]}}, "twice"),
        ({"grid": {"model.name": ["a b", "a/b"]}}, "name the values"),
        ({"seeds": list(range(200)), "grid": {"epsilon": [i / 1000 for i in range(1, 200)]}}, "points"),
        ({"set": {"output": "elsewhere"}}, "output: a sweep sets it for every run"),
        ({"grid": {"seed": [1, 2]}}, "write `seeds:` at the top"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml"),
        ({"name": "../up"}, "name"),
        ({"grids": [{"epsilon": [0.1]}]}, "either"),
        ({"set": {"epsilon": 0.2}, "grid": {"epsilon": [0.1]}}, "epsilon: both `set` and the axis epsilon set it"),
        ({"set": {"method.alpha": 0.1}, "grid": {"m": {"a": {"method": {"name": "free"}}}}}, "`set` and the axis m set"),
        ({"grid": {"epsilon": [0.1], "m": {"a": {"epsilon": 0.2}}}}, "epsilon: both the axis epsilon and the axis m"),
        ({"grid": {"examples": {"a": {"epsilon": 0.2}}}}, "results.csv has a column examples"),
        ({"grid": {}, "grids": [{"epsilon": [0.1]}, {"data.limit": [9]}]}, "same axes"),
    ],
)
def test_mistakes_are_explained(sweep_file, tmp_path, capsys, changes, words):
    assert cli(["sweep", str(sweep_file(**changes))]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_several_grids_are_one_sweep(sweep_file):
    """The values of one axis may depend on another's; the axes are the same, and so every run has its own place."""
    grids = [
        {"method": {"fgsm": {}}, "phases.0.epochs": [1, 2]},
        {"method": {"free": {"method": {"name": "free"}}}, "phases.0.epochs": [8]},
    ]
    found = sweep.points(sweep.read_sweep(sweep_file(grid={}, grids=grids, seeds=2)))
    places = [(p.config.method.name, p.config.epochs, p.seed) for p in found]
    assert places == [(*place, seed) for place in (("fgsm", 1), ("fgsm", 2), ("free", 8)) for seed in (0, 1)]
    assert found[4].labels == (("method", "free"), ("phases.0.epochs", "8"))
    assert found[4].config.name == "method-free_epochs-8_seed-0"


def test_a_missing_sweep_file(tmp_path, capsys):
    assert cli(["sweep", str(tmp_path / "no.yaml")]) == 2
    assert "no.yaml" in capsys.readouterr().err


def test_a_scheduler_trains_the_same_weights_and_names_what_fails(sweep_file, tmp_path, monkeypatch, capfd):
    pytest.importorskip("submitit")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the jobs, as here: sums depend on the number of threads
    grid = {"optimizer": {"fine": {}, "wild": {"schedule.max_lr": 1e30}}}
    assert cli(["sweep", str(sweep_file("there", seeds=1, grid=grid)), "--cluster", "local", "--with", "timeout_min=5"]) == 1
    captured = capfd.readouterr()
    assert "2 jobs submitted" in captured.out and (tmp_path / "runs/there/jobs").is_dir()
    assert re.search("error: optimizer-wild_seed-0: .*loss became", captured.err)
    assert "fine" not in captured.err
    assert cli(["sweep", str(sweep_file("here", seeds=1, grid={"optimizer": {"fine": {}}}))]) == 0
    a, b = (read_weights(tmp_path / "runs" / d / "optimizer-fine_seed-0")[0].state_dict() for d in ("here", "there"))
    assert all((a[k] == b[k]).all() for k in a)
    ledger = json.loads((tmp_path / "runs/there/submitted.json").read_text())
    assert ledger.keys() == {"optimizer-fine_seed-0", "optimizer-wild_seed-0"}


SBATCH = """#!/bin/bash
folder=$(dirname "$0"); id=$((1000 + $(cat $folder/count 2>/dev/null | wc -l))); echo $id >> $folder/count
echo "Submitted batch job $id"
"""
SACCT = """#!/bin/bash
folder=$(dirname "$0"); echo "JobID|State|NodeList"
for id in $(cat $folder/count); do for task in "" _0 _1; do echo "$id$task|$(cat $folder/state)|here"; done; done
"""


def test_slurm_is_given_an_array_and_no_job_twice(sweep_file, tmp_path, monkeypatch, capfd):
    """With stand-ins for sbatch and sacct, which run nothing; the files and commands are submitit's own."""
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 0.1)  # of a slow file system; else 15 s for each lost job
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": "", "sacct": SACCT}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    file = sweep_file(seeds=1)
    (tools / "state").write_text("PENDING")
    with monkeypatch.context() as patched:
        patched.setattr(sweep.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli(["sweep", str(file), "--cluster", "slurm", "--with", "timeout_min=5", "slurm_partition=gpu"]) == 130
        assert "2 jobs submitted, 0 still" in capfd.readouterr().out
        script = next((tmp_path / "runs/grid/jobs").glob("*.sh")).read_text()
        assert "--array=0-1" in script and "--partition=gpu" in script
        assert cli(["sweep", str(file), "--cluster", "slurm"]) == 130
        assert "0 jobs submitted, 2 still" in capfd.readouterr().out
    (tools / "state").write_text("FAILED")
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: None)
    assert cli(["sweep", str(file), "--cluster", "slurm"]) == 1  # those were lost, and so are these
    captured = capfd.readouterr()
    assert "2 jobs submitted, 0 still" in captured.out
    assert "error: max_lr-0.001_seed-0: " in captured.err and "FAILED" in captured.err


def test_bad_scheduler_options_are_explained(sweep_file, capsys):
    pytest.importorskip("submitit")
    assert cli(["sweep", str(sweep_file()), "--cluster", "local", "--with", "colour=red"]) == 2
    assert re.search(r"--cluster local colour=red: .*colour", capsys.readouterr().err)


def test_the_sweep_of_figure_2_is_whole(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    found = sweep.points(sweep.read_sweep("configs/sweeps/figure2.yaml"))
    assert len(found) == 3 * 4 * 3
    rates = {(p.config.method.name, p.config.schedule.max_lr) for p in found}
    assert rates == {("fgsm", 0.21), ("pgd", 0.21), ("free", 0.04)}


def test_a_sweep_file_whose_name_is_not_utf8(sweep_file, capsys):
    file = sweep_file(seeds=1)
    assert cli(["sweep", str(file.rename(file.with_name("nu\udce9.yaml"))), "--dry-run"]) == 2
    assert "name: 'nu\\udce9' is no name for a folder" in capsys.readouterr().err
