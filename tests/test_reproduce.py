"""Reproducing the paper: what the rows train, how results are kept and resumed, and the miniature itself."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from benchmarks import paper, reproduce
from fastrobust.data import sources
from fastrobust.errors import DataError


def test_every_row_is_a_config_and_one_name_one_run():
    configs = {}
    for scale, tables in paper.ROWS.items():
        for rows in tables.values():
            for row in rows:
                if row.config:
                    found = reproduce.config_of(row, 3, scale, "cpu", None)
                    assert found.seed == 3 and found.output == f"runs/reproduce/{scale}"
                    assert configs.setdefault((scale, row.name), found) == found


@pytest.mark.parametrize("name, expected", [
    ("cifar10_fgsm_zero", ("fgsm", "zero", 8, 30, 0.05)), ("cifar10_fgsm_previous", ("fgsm", "previous", 8, 30, 0.05)),
    ("cifar10_fgsm_random", ("fgsm", "random", 8, 30, 0.05)), ("cifar10_fgsm", ("fgsm", "random", 10, 30, 0.05)),
    ("cifar10_fgsm_alpha16", ("fgsm", "random", 16, 30, 0.05)), ("cifar10_free", ("free", 8, None, 400, 0.05)),
    ("cifar10_pgd", ("pgd", 8, 2, 400, 0.1)), ("cifar10_fgsm_fast", ("fgsm", "random", 10, 15, 0.21)),
    ("cifar10_pgd_fast", ("pgd", 8, 2, 15, 0.21)), ("cifar10_free_fast", ("free", 8, None, 88, 0.04)),
])  # fmt: skip
def test_the_rows_are_appendix_a_and_b(name, expected):
    """(method, start or steps or replays, alpha in 255ths, epochs, highest rate)"""
    from fastrobust import config

    c = config.load(reproduce.ROOT / "configs" / f"{name}.yaml")
    m = c.method
    alpha = None if m.name == "free" else round(m.alpha * 255, 6)
    second = m.init if m.name == "fgsm" else m.replays if m.name == "free" else m.steps
    rate = c.schedule.lr if c.schedule.name == "multistep" else c.schedule.max_lr
    assert (m.name, second, alpha, c.epochs, rate) == expected
    assert (c.epsilon, c.phases[0].batch_size) == (8 / 255, 128)
    assert (c.optimizer.momentum, c.optimizer.weight_decay) == (0.9, 5e-4)
    assert c.schedule.name == ("multistep" if c.epochs == 400 else "cyclic")
    e = c.evaluation
    assert (e.steps, e.restarts, e.epsilon, e.alpha) == (50, 10, (8 / 255,), 2 / 255)


def test_a_config_opens_with_its_command_and_its_figures():
    rows = {row.name: row for tables in ("table1", "table3") for row in paper.ROWS["full"][tables]}
    for row in rows.values():
        if row.config:
            head = (reproduce.ROOT / "configs" / row.config).read_text()
            assert head.startswith(f"# python -m fastrobust.train configs/{row.config}\n")
            figures = [row.paper["clean"], row.paper["robust"]] if "clean" in row.paper else [row.paper["minutes"]]
            assert all(f"{figure:.2f}" in head for figure in figures) and "FLOP" in head


def test_the_schedules_of_figure_1_are_those_of_the_configs():
    from fastrobust import config

    for name, file in (("CIFAR-10", "cifar10_fgsm_fast.yaml"), ("ImageNet", "imagenet_3phase.yaml")):
        c = config.load(reproduce.ROOT / "configs" / file)
        assert (c.schedule, c.epochs) == paper.SCHEDULES[name]


# ---- how it works, on tiny runs


@pytest.fixture
def tiny(config_file, few_bars, tmp_path, monkeypatch):
    """Two rows of quick runs as a scale of their own, results and runs in tmp_path."""
    changes = {"data__path": str(few_bars), "phases": [{"epochs": 2, "batch_size": 35, "resolution": 28}]}
    file = str(config_file(tmp_path, evaluation={"steps": 2, "restarts": 1, "epsilon": [0.05, 0.1]}, **changes))
    a = paper.Row("a", "FGSM", file, (), {"clean": 81.48, "robust": 0.5, "robust1": 33.25, "minutes": 6.02, "epochs": 15}, 2)
    b = paper.Row("b", "standard", file, ("method={name: standard}",), {"clean": 99.2}, 1)
    c = paper.Row("c", "FGSM", file, ("phases.0.epochs=1",), {}, 3)
    d = paper.Row("d", "somebody else's", None, (), {"clean": 12.34})
    rows = {"table1": [a, b, d], "table2": [a], "table3": [a], "figure1": [], "figure2": [c, a]}
    monkeypatch.setitem(paper.ROWS, "small", rows)
    monkeypatch.setitem(paper.RADII, "small", [0.05, 0.1])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments) -> int:
    return reproduce.main(["--scale", "small", "--results", "results", *arguments])


def test_rows_are_trained_kept_and_told(tiny, capsys):
    assert call() == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("[")] == [
        "[1/3] b, seed 0",
        "[2/3] a, seed 0",
        "[3/3] c, seed 0",
    ]
    files = {file.name: json.loads(file.read_text()) for file in (tiny / "results/small").iterdir()}
    assert files.keys() == {"a_seed0.json", "b_seed0.json", "c_seed0.json"}
    for name, found in files.items():
        summary = json.loads((tiny / "runs/reproduce/small" / name[:-5] / "summary.json").read_text())
        assert found["summary"] == summary and len(found["history"]) == summary["epochs"]
        assert f"{100 * summary['robust_accuracy']:.2f}" in out
    a = files["a_seed0.json"]["summary"]["evaluations"]
    html = (tiny / "results/small.html").read_text()
    row = next(line for line in html.splitlines() if "81.48" in line and "33.25" in line)
    cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", row)
    clean, *robust = (f"{100 * value:.2f}" for value in (a[0]["clean_accuracy"], *(e["robust_accuracy"] for e in a)))
    assert cells[1:7] == ["81.48", clean, "0.50", robust[0], "33.25", robust[1]]
    assert cells[7:10] == ["20", "1", "pgd\u20112\u20111"]
    assert "somebody else" in html and "12.34" in html
    assert html.count("<polyline") == 4 and "miniature" in html  # two schedules, two accuracies

    shutil.rmtree(tiny / "runs")  # the results are files: nothing is trained again
    assert call() == 0
    assert "[1/" not in capsys.readouterr().out and not (tiny / "runs").exists()
    assert call("--seeds", "2", "table2") == 0
    assert "[1/1] a, seed 1" in capsys.readouterr().out
    both = [json.loads((tiny / f"results/small/a_seed{s}.json").read_text())["summary"]["robust_accuracy"] for s in (0, 1)]
    text = f"{50 * sum(both):.2f} ({100 * min(both):.2f} to {100 * max(both):.2f})"
    assert text in (tiny / "results/small.html").read_text()


def test_out_of_minutes_it_can_go_on(tiny, capsys, monkeypatch):
    """The first run is stopped by the clock within its second epoch and resumes there."""
    from fastrobust import trainer

    real = trainer.Trainer._guard

    def slow(self, *arguments):
        import time

        time.sleep(4)
        return real(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Trainer, "_guard", slow)
        assert call("table2", "--minutes", "0.05") == 1
    out = capsys.readouterr().out
    assert "open: a seed 0: stopped by SIGTERM" in out and "not measured" in out
    run = tiny / "runs/reproduce/small/a_seed0"
    assert (run / "checkpoint.pt").exists() and not (run / "summary.json").exists()
    epochs = len((run / "metrics.jsonl").read_text().splitlines())
    assert epochs == 1
    assert call("table2") == 0
    assert "open" not in capsys.readouterr().out
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_without_its_data_a_row_stays_open_and_the_others_go_on(tiny, capsys, monkeypatch):
    real = sources.load

    def load(dataset, split, path=None, **options):
        if options["limit"] == 13:
            raise DataError("no such images")
        return real(dataset, split, path, **options)

    monkeypatch.setattr(sources, "load", load)
    rows = paper.ROWS["small"]
    rows["table1"][1] = paper.Row("b", "standard", rows["table1"][0].config, ("data.limit=13",), {}, 1)
    assert call("table1") == 1
    captured = capsys.readouterr()
    assert "open: b seed 0: no such images" in captured.out and "no such images" in captured.err
    assert (tiny / "results/small/a_seed0.json").exists()


@pytest.mark.parametrize(
    "arguments, word", [(["table9"], "table9"), (["--minutes", "0"], "minutes"), (["--minutes", "-1"], "minutes")]
)
def test_mistakes_are_explained(tiny, capsys, arguments, word):
    assert call(*arguments) == 2
    assert word in capsys.readouterr().err
    assert list(tiny.iterdir()) == [tiny / "bars.yaml"]


def test_a_damaged_result_is_named(tiny, capsys):
    (tiny / "results/small").mkdir(parents=True)
    (tiny / "results/small/a_seed0.json").write_text("{}")
    assert call("table2") == 2
    assert "a_seed0.json" in capsys.readouterr().err


# ---- the miniature


def test_the_miniature_shows_the_order_of_the_methods(tmp_path, monkeypatch, capsys):
    """Tables 1 to 3 and Figures 1 and 2 in miniature, as the command makes them: 9 runs, some minutes."""
    try:
        sources.locate("fashion_mnist")
    except DataError:
        pytest.skip("needs Fashion-MNIST")
    monkeypatch.chdir(tmp_path)
    assert call() == 0
    results = {file.name.removeprefix("small_").removesuffix("_seed0.json"): reproduce.read_result(file)
               for file in (tmp_path / "results/small").iterdir()}  # fmt: skip
    robust = {name: result.robust(0.25) for name, result in results.items()}
    healthy = min(robust[name] for name in ("random", "previous", "free", "pgd"))
    print(robust)
    assert healthy > 0.45
    assert robust["zero"] < healthy - 0.3 and robust["alpha2"] < healthy - 0.12
    assert min(results[name].summary["clean_accuracy"] for name in ("zero", "alpha2")) > 0.65  # and nothing else shows it
    assert "A miniature, not a reproduction" in capsys.readouterr().out
    assert (tmp_path / "results/small.html").read_text().count("<polyline") == 2 + 6
