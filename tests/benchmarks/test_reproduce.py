"""Reproducing the paper: what the rows train, how results are kept and resumed, and the miniature itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import time

import pytest
from data_files import fashion_mnist

from benchmarks import paper, reproduce, tables
from fastrobust.config import reading
from fastrobust.data import sets
from fastrobust.runtime.errors import DataError
from fastrobust.train.training import Training
from fastrobust.tuning import sweep


def test_every_row_is_a_config_and_one_name_one_run():
    configs = {}
    for scale, named in paper.ROWS.items():
        for rows in named.values():
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

    c = reading.load(reproduce.ROOT / "configs" / f"{name}.yaml")
    m = c.method
    alpha = None if m.name == "free" else round(m.alpha * 255, 6)
    second = m.init if m.name == "fgsm" else m.replays if m.name == "free" else m.steps
    rate = c.schedule.lr if c.schedule.name == "multistep" else c.schedule.max_lr
    assert (m.name, second, alpha, c.epochs, rate) == expected
    assert (c.epsilon, c.phases[0].batch_size) == (8 / 255, 128)
    assert (c.optimizer.momentum, c.optimizer.weight_decay) == (0.9, 5e-4)
    assert c.schedule.name == ("multistep" if c.epochs == 400 else "cyclic")
    e = c.evaluation
    assert (e.steps, e.restarts, e.epsilon, e.alpha) == (50, 10, (8 / 255,), (2 / 255,))
    assert c.model.name == "preact_resnet18_paper"


def test_a_config_opens_with_its_command_and_its_figures():
    rows = [row for name in ("table1", "table2", "table3", "table4") for row in paper.ROWS["full"][name] if row.config]
    assert len({row.config for row in rows}) == len(rows) == 7 + 3 + 3 + 4
    for row in rows:
        head = re.match(r"(#.*\n)+", (reproduce.ROOT / "configs" / row.config).read_text()).group()
        assert f"# python -m fastrobust.train configs/{row.config}\n" in head
        if row.config.startswith(("cifar", "mnist")):
            assert head.startswith("# python -m fastrobust.train")  # ImageNet is prepared first
        figures = {k: v for k, v in row.paper.items() if k in ("clean", "first", "robust", "robust1", "minutes")}
        assert figures or "Ours" in head
        assert all(f"{figure:.2f}" in head for figure in figures.values()) and re.search(r"[TPE]FLOP", head), row.name


def test_every_config_opens_with_its_command_and_a_figure():
    for file in [*(reproduce.ROOT / "configs").glob("*.yaml"), *(reproduce.ROOT / "configs/sweeps").glob("*.yaml")]:
        head = re.match(r"(#.*\n)+", file.read_text()).group()
        command = rf"# (python -m fastrobust\.train|fastrobust sweep) {file.relative_to(reproduce.ROOT)}\n"
        assert re.search(command, head) or head.startswith(f"# make {file.stem}\n"), file.name
        assert re.search(r"\d %|No accuracy was measured yet", head), file.name


def test_the_rows_of_imagenet_are_the_papers():

    for row in paper.ROWS["full"]["table4"]:
        c = reading.load(reproduce.ROOT / "configs" / row.config)
        epsilon = (2 if "2/255" in row.label else 4) / 255
        e = c.evaluation
        assert (c.epsilon, e.epsilon, e.alpha, c.precision) == (epsilon, (epsilon,), (1 / 255,), "fp16")
        assert (c.method.name, c.epochs, c.replays) == (("free", 92, 4) if "Free" in row.label else ("fgsm", 15, 1))
    for row in paper.ROWS["full"]["table5"]:
        c = reading.load(reproduce.ROOT / "configs" / row.config, list(row.overrides))
        assert [phase.epochs for phase in c.phases] == [epochs for epochs, _ in row.paper["phases"]]
        assert c.precision == ("fp32" if "single" in row.label else "fp16") and c.epsilon == 2 / 255


def test_the_schedules_of_figure_1_are_those_of_the_configs():

    for name, file in (("CIFAR-10", "cifar10_fgsm_fast.yaml"), ("ImageNet", "imagenet_3phase.yaml")):
        c = reading.load(reproduce.ROOT / "configs" / file)
        assert (c.schedule, c.epochs) == paper.SCHEDULES[name]


def test_figure_2_is_one_sweep_and_has_the_runs_of_table_3(monkeypatch):
    """The sweep command and `benchmarks.reproduce` train the same runs, and Table 3's rows are among them."""
    monkeypatch.chdir(reproduce.ROOT)
    of_run = {"name": "x", "output": "x", "seed": 0}
    trained = [p.config.model_copy(update=of_run) for p in sweep.points(sweep.read_sweep("configs/sweeps/figure2.yaml"))]
    rows = paper.ROWS["full"]["figure2"]
    shown = [reproduce.config_of(row, 0, "full", "auto", None).model_copy(update=of_run) for row in rows]
    assert trained == [config for config in shown for _ in range(3)]  # three seeds
    lengths = {label: [int(tables.epochs_of(row)) for row in rows if row.label == label] for label in paper.FIRST_TO_45}
    assert lengths == {"FGSM": [4, 8, 15, 30], "PGD": [4, 8, 15, 30], "Free": [16, 40, 88, 120]}
    ours = {row.name for row in paper.ROWS["full"]["table3"] if row.config}
    assert ours == {row.name for row in rows if int(tables.epochs_of(row)) == paper.FIRST_TO_45[row.label]}
    for c in shown:
        rate = 0.04 if c.method.name == "free" else 0.21
        assert (c.schedule.max_lr, c.schedule.peak, c.precision) == (rate, 0.4, "fp16")


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


def test_rows_are_trained_kept_and_told(tiny, few_bars, capsys):
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
    cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", row)  # of Table 2, whose only row says its own facts
    clean, *robust = (f"{100 * value:.2f}" for value in (a[0]["clean_accuracy"], *(e["robust_accuracy"] for e in a)))
    assert cells[1:7] == ["81.48", clean, "0.50", robust[0], "33.25", robust[1]]
    assert cells[7:9] == ["pgd\u20112\u20111, n = 20", "1"] and cells[10] == f"image_folder ({few_bars.name})"
    assert (
        f"Of all that was measured: attack: pgd\u20112\u20111, n = 20; seeds: 1; data: image_folder ({few_bars.name})"
        in html
    )
    assert "somebody else" in html and "12.34" in html
    assert html.count("<figure>") == 4 and "miniature" in html  # two schedules, two accuracies

    shutil.rmtree(tiny / "runs")  # the results are files: nothing is trained again
    assert call() == 0
    assert "[1/" not in capsys.readouterr().out and not (tiny / "runs").exists()
    assert call("--seeds", "2", "table2") == 0
    assert "[1/1] a, seed 1" in capsys.readouterr().out
    both = [json.loads((tiny / f"results/small/a_seed{s}.json").read_text())["summary"]["robust_accuracy"] for s in (0, 1)]
    text = f"{50 * sum(both):.2f} <small>({100 * min(both):.2f} to {100 * max(both):.2f})</small>"
    assert text in (tiny / "results/small.html").read_text()


def test_out_of_minutes_it_can_go_on(tiny, capsys, monkeypatch):
    """The first run is stopped by the clock within its second epoch and resumes there."""

    real = Training._guard

    def slow(self, *arguments):
        time.sleep(4)
        return real(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "_guard", slow)
        assert call("table2", "--minutes", "0.05") == 1
    out = capsys.readouterr().out
    assert "open: a, seed 0: stopped by SIGTERM" in out and "not measured" in out
    run = tiny / "runs/reproduce/small/a_seed0"
    assert (run / "checkpoint.pt").exists() and not (run / "summary.json").exists()
    epochs = len((run / "metrics.jsonl").read_text().splitlines())
    assert epochs == 1
    assert call("table2") == 0
    assert "open" not in capsys.readouterr().out
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_without_its_data_a_row_stays_open_and_the_others_go_on(tiny, capsys, monkeypatch):
    real = sets.load

    def load(dataset, split, path=None, **options):
        if options["choice"].limit == 13:
            raise DataError("no such images")
        return real(dataset, split, path, **options)

    monkeypatch.setattr(sets, "load", load)
    rows = paper.ROWS["small"]
    rows["table1"][1] = paper.Row("b", "standard", rows["table1"][0].config, ("data.limit=13",), {}, 1)
    assert call("table1") == 1
    captured = capsys.readouterr()
    assert "open: b, seed 0: no such images" in captured.out and "no such images" in captured.err
    assert (tiny / "results/small/a_seed0.json").exists()


def test_one_row_alone(tiny, capsys):
    assert call("table1", "table3", "--only", "a", "--seeds", "2") == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")] == [
        "[1/2] a, seed 0",
        "[2/2] a, seed 1",
    ]


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["table9"], "table9"),
        (["--minutes", "0"], "minutes"),
        (["--minutes", "-1"], "minutes"),
        (["table1", "--only", "c"], "--only"),
    ],
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


# ---- tables out of results that are made up


def result(row: str, seconds: list[tuple[int, float]] = ((0, 60.0), (0, 40.0)), device: str = "GPU A", **changes) -> dict:
    """`seconds`: (phase, seconds) of each pass."""
    found = {"attack": "pgd-50-10", "robust_accuracy": 0.5, "examples": 100, "seconds": 1.0}
    evaluations = [found | {"epsilon": 0.3}, found | {"epsilon": 0.1, "robust_accuracy": 0.75}]
    evaluations[0]["robust_accuracy_after_one_restart"] = 0.625
    summary = {"dataset": "d", "clean_accuracy": 0.875, "evaluations": evaluations, "stopped": None, "epochs": len(seconds),
               "train_seconds": sum(s for _, s in seconds),
               "hardware": {"device": device, "cpu": "CPU", "threads": 1}}  # fmt: skip
    history = [{"phase": p, "seconds": s} for p, s in seconds]
    return {"row": row, "config": {"seed": 0, "method": {}}, "summary": summary, "history": history, "data": "d"} | changes


def write(folder, name: str, seed: int, content: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}_seed{seed}.json").write_text(json.dumps(content))


def table(name: str, folder) -> tables.Table:
    return tables.TABLES[name]("full", paper.ROWS["full"][name], folder)


def test_times_of_different_hardware_have_rows_of_their_own(tmp_path):
    name = "cifar10_fgsm_fast"
    for seed, (device, seconds) in enumerate([("GPU A", 30.0), ("GPU B", 90.0), ("GPU A", 50.0)]):
        write(tmp_path, name, seed, result(name, [(0, seconds)] * 15, device))
    content = table("table3", tmp_path)
    mine = [dict(zip(content.head, row, strict=True)) for row in content.rows if row[0] == "FGSM"]
    assert [(row["hardware"], row["seeds"], row["ours: s/epoch"], row["ours: minutes"]) for row in mine] == [
        ("GPU A", "2", "40.00 (30.00 to 50.00)", "10.00 (7.50 to 12.50)"), ("GPU B", "1", "90.00", "22.50"),
    ]  # fmt: skip


def test_table_5_counts_epochs_of_free_and_keeps_hardware_apart(tmp_path):
    fgsm = [(0, 600.0)] * 6 + [(1, 1200.0)] * 6 + [(2, 1800.0)] * 3
    write(tmp_path, "imagenet_3phase_eps2", 0, result("imagenet_3phase_eps2", fgsm, "GPU A"))
    begun_elsewhere = reproduce.both({"device": "GPU A", "cpu": "CPU", "threads": 1}, {"device": "GPU B"})
    write(tmp_path, "imagenet_3phase_eps2", 1, result("imagenet_3phase_eps2", fgsm, begun_elsewhere["device"]))
    free = result("imagenet_free_eps2", [(0, 2400.0)] * 23, config={"seed": 0, "method": {"replays": 4}})
    write(tmp_path, "imagenet_free_eps2", 0, free)
    content = table("table5", tmp_path)
    rows = [dict(zip(content.head, row, strict=True)) for row in content.rows]
    mixed = [row for row in rows if "mixed" in row[""] and row["ours: min/epoch"] != "not measured"]
    assert [(r["epochs"], r["ours: min/epoch"], r["ours: hours"], r["hardware"]) for r in mixed] == [
        ("6", "10.00", "", "GPU A"), ("6", "20.00", "", "GPU A"), ("3", "30.00", "", "GPU A"), ("15", "", "4.50", "GPU A"),
        *[(e, m, h, "GPU A, then GPU B") for e, m, h in (("6", "10.00", ""), ("6", "20.00", ""), ("3", "30.00", ""))],
        ("15", "", "4.50", "GPU A, then GPU B"), ("92", "10.00", "15.33", "GPU A"),
    ]  # fmt: skip
    assert {(r["epochs"], r["paper: hours"]) for r in rows if r["paper: hours"]} == {
        ("15", "14.59"), ("92", "52.20"), ("15", "12.14"), ("92", "38.76")}  # fmt: skip


def test_table_4_has_the_first_restart_and_table_2_what_was_verified(tmp_path, monkeypatch):
    write(tmp_path, "imagenet_free", 0, result("imagenet_free"))
    row = next(row for row in table("table4", tmp_path).rows if row[0] == "Free (m = 4), epsilon = 4/255")
    assert row[1:7] == ["60.42", "87.50", "31.22", "62.50", "31.08", "50.00"]

    monkeypatch.chdir(tmp_path)
    folder, rows = tmp_path / "results", paper.ROWS["full"]["table2"]
    for one in ("mnist_pgd", "mnist_fgsm"):
        write(folder, one, 0, result(one))
    counts = {"verified": 96, "falsified": 2, "misclassified": 1, "timeout": 1, "timeout_seconds": 60.0}
    verdicts = tmp_path / paper.RUNS / "full" / "mnist_pgd_seed0" / "verification" / "epsilon-0.1" / "summary.json"
    verdicts.parent.mkdir(parents=True)
    verdicts.write_text(json.dumps(counts | {"verified_accuracy": 0.96}))
    reproduce.add_verdicts(rows, folder, "full")
    content = table("table2", folder)
    found = {row[0]: dict(zip(content.head, row, strict=True)) for row in content.rows}
    keys = ("paper: PGD % 0.1", "ours: PGD % 0.1", "ours: PGD % 0.3", "paper: verified % 0.1", "ours: verified % 0.1")
    assert [found["PGD"][key] for key in keys] == ["97.66", "75.00", "50.00", "96.70", "96.00"]
    assert [found["FGSM"][key] for key in keys] == ["97.53", "75.00", "50.00", "96.80", "not measured"]
    ours = next(cells for label, cells in found.items() if label.startswith("ours, not the paper's"))
    assert [ours[key] for key in keys] == ["", "not measured", "not measured", "", "not measured"]
    assert content.notes[0].startswith("PGD, seed 0: 96 verified, 2 falsified, 1 misclassified, 1 timeout; 60 s an image")


def test_seconds_say_what_they_hold(tmp_path):
    for seed, first in enumerate((21.0, 26.0)):
        write(tmp_path, "fashion_mnist_fast", seed, result("fashion_mnist_fast", [(0, first), (0, 20.0), (0, 20.0)]))
    content = table("seconds", tmp_path)
    row = dict(zip(content.head, content.rows[0], strict=True))
    assert (row["seconds"], row["of them warm-up"]) == ("63.5 (61.0 to 66.0)", "3.5 (1.0 to 6.0)")
    assert (row["PGD %"], row["reached"]) == ("50.00 (50.00 to 50.00)", "0 of 2")
    assert content.notes == (paper.RULE,)


# ---- the miniature


WHOLE = "FASTROBUST_WHOLE_MINIATURE" in os.environ  # `make stress`


def test_the_miniature_shows_the_order_of_the_methods(tmp_path, monkeypatch, capsys):
    """Tables 1 to 3 and Figures 1 and 2 in miniature, as the command makes them: four of twelve runs, in `make stress`
    all of them. The bounds lie half-way between what seeds 0 to 2 gave (benchmarks/RECORDS.md), and seed 0 on another
    processor (docs/lab_notes.md)."""
    fashion_mnist()
    monkeypatch.chdir(tmp_path)
    names = {row.name.removeprefix("small_") for rows in paper.ROWS["small"].values() for row in rows}
    names = names if WHOLE else {"zero", "random", "free_8epochs", "pgd_5epochs"}
    assert call("--only", *(f"small_{name}" for name in sorted(names))) == 0
    results = {file.name.removeprefix("small_").removesuffix("_seed0.json"): tables.read_result(file)
               for file in (tmp_path / "results/small").iterdir()}  # fmt: skip
    robust = {name: found.robust(0.25) for name, found in results.items()}
    print(robust)
    assert robust.keys() == names
    content = {title.split(" in miniature")[0]: made for title, _, made in tables.build(
        ["table1", "table2", "table3", "figure2"], tmp_path / "results/small", "small")}  # fmt: skip

    # Table 1: zero start at most 16.6 %, the random start at least 41.8 %
    assert robust["zero"] < 0.25 < 0.386 < robust["random"]
    assert results["zero"].clean > 0.6  # and nothing else shows it; at least 75.8 %
    told = {row[0]: row[4] for row in content["Table 1"].rows}
    assert told["FGSM, zero init"] == f"{100 * robust['zero']:.2f}" and len(told) == 6

    # Table 2: at 0.1 at least 67.6 %, and by 8.8 points or more above that at 0.25
    assert results["random"].robust(0.1) > max(0.55, robust["random"])
    assert content["Table 2"].rows[1][4:7:2] == [f"{100 * results['random'].robust(e):.2f}" for e in (0.1, 0.25)]

    # Figure 2: 8 epochs of Free at least 43.2 %, 5 of PGD at least 45.4 %
    assert min(robust["free_8epochs"], robust["pgd_5epochs"]) > 0.3
    every = [(f"random_{n}epochs", n) for n in (5, 10)] + [("random", 20)] + [(f"free_{n}epochs", n) for n in (8, 16)]
    every += [("free", 32)] + [(f"pgd_{n}epochs", n) for n in (5, 7)] + [("pgd", 10)]
    assert [row[1:3] for row in content["Figure 2"].rows] == [
        [str(n), f"{100 * robust[name]:.2f}" if name in robust else "not measured"] for name, n in every
    ]
    assert "A miniature, not a reproduction" in capsys.readouterr().out
    assert (tmp_path / "results/small.html").read_text().count("<figure>") == 2 + 2
    if WHOLE:
        the_whole_order(results, robust, content)


def the_whole_order(results: dict, robust: dict, content: dict) -> None:
    # Table 1: steps of 2 epsilon at most 35.4 %, the others at least 57.4 %; the random start is at least 21.2 points above
    # steps of 2 epsilon with the same seed on the same processor
    assert robust["alpha2"] < 0.386 and robust["alpha2"] < robust["random"] - 0.1
    assert min(robust[name] for name in ("previous", "free", "pgd")) > 0.5
    assert results["alpha2"].clean > 0.6
    assert results["pgd"].robust(0.1) > max(0.55, robust["pgd"])  # Table 2

    # Table 3: PGD (at least 57.6 %) and Free (62.8 %) reach their 50 %; FGSM does with two seeds of three
    head = content["Table 3"].head
    rows = {row[0]: dict(zip(head, row, strict=True)) for row in content["Table 3"].rows}
    assert rows["PGD"]["reached 50%"] == rows["Free"]["reached 50%"] == "1 of 1"
    for label, name in (("PGD", "pgd"), ("Free", "free"), ("FGSM", "random")):
        assert rows[label]["ours: minutes"] == f"{results[name].seconds / 60:.2f}"
    for name, short in (("random", 5), ("free", 8), ("pgd", 5)):  # Figure 2: by 7.6 points or more
        assert robust[name] > robust[f"{name}_{short}epochs"]
