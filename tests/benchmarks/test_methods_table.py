"""The comparison of training methods: what is trained for how long, how runs are kept, resumed and put together, and what
the tables, the Pareto front and the page say."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import method_costs, methods
from benchmarks import method_setting as setting
from benchmarks import method_tables as tables
from fastrobust.config import parts, reading
from fastrobust.evaluation.from_python import evaluate
from fastrobust.evaluation.trained import open_trained
from fastrobust.train.training import Training

ROOT = Path(__file__).parents[2]
SCALES = list(setting.FILES)

# ---- what is compared


def test_without_autoattacks_package_nothing_is_trained(monkeypatch, tmp_path, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(methods, "run", lambda *job: pytest.fail("trained"))
    assert methods.main(["--scale", "small", "--results", str(tmp_path)]) == 2
    assert "pip install 'fastrobust[autoattack]'" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("scale", SCALES)
def test_all_methods_of_the_package_are_compared_with_one_recipe(scale):
    configs = {m: setting.config_of(scale, setting.Job(m, 3, 7)) for m in setting.METHODS}
    assert {c.method.name for c in configs.values()} == parts.METHODS.keys()
    own = ("name", "method", "label_smoothing")
    (recipe,) = {
        json.dumps({k: v for k, v in c.to_dict().items() if k not in own}, sort_keys=True) for c in configs.values()
    }
    assert json.loads(recipe)["seed"] == 7 and json.loads(recipe)["phases"][0]["epochs"] == 3
    usual = configs["fgsm"].label_smoothing
    for method, c in configs.items():
        own = hasattr(getattr(c.method, "of", c.method), "label_smoothing")
        assert c.label_smoothing == (0 if own else usual), method
        assert c.precision != "auto"  # else a machine would decide it
        assert c.guard.action == "warn"  # else the guard would save what collapses
    digests = [setting.digest(c) for c in configs.values()]
    assert len(set(digests)) == len(digests)


def test_the_digest_is_of_what_decides_a_result():
    auto, half, other = (setting.base("small", "fgsm", (f"precision={p}",)) for p in ("auto", "bf16", "fp32"))
    assert setting.digest(half) != setting.digest(other), "means are of one precision"
    assert {setting.digest(half), setting.digest(other)} < setting.digests(auto) and setting.digests(half) == {
        setting.digest(half)
    }
    make = lambda *changes: setting.digest(setting.base("small", "fgsm", changes))
    usual = make()
    assert usual == make("seed=5", "name=x", "device=cpu", "data.path=/elsewhere", "data.workers=3", "output=/tmp")
    for change in ("data.limit=4999", "epsilon=7/255", "method.alpha=9/255", "evaluation.limit=10", "label_smoothing=0.11"):
        assert usual != make(change), change


@pytest.mark.parametrize("scale", SCALES)
def test_equal_cost_is_the_nearest_that_whole_passes_can_be(scale):
    """Against all lengths there are."""
    usual = setting.base(scale, "fgsm").epochs
    assert setting.epochs(scale, "fgsm", "equal cost") == setting.epochs(scale, "fgsm", "equal epochs") == usual
    for name in setting.METHODS:
        method = setting.base(scale, name).method
        lengths = range(method.updates_per_batch, 10 * usual, method.updates_per_batch)
        for schedule, goal in (("equal epochs", usual), ("equal cost", usual * 5 / setting.passes(method))):
            found = setting.epochs(scale, name, schedule)
            assert found in lengths and abs(found - goal) == min(abs(n - goal) for n in lengths), (name, schedule)
        assert setting.cost(method, 6) == pytest.approx(6 * setting.passes(method) / 3)


def test_the_most_telling_runs_come_first_and_none_twice():
    jobs = methods.wanted("small", ["fgsm", "liet"], 2)
    usual, liet = (setting.epochs("small", m, "equal cost") for m in ("fgsm", "liet"))
    expected = [("fgsm", usual), ("liet", usual), ("liet", liet)]
    assert jobs == [setting.Job(m, n, seed) for seed in (0, 1) for m, n in expected]


# ---- how it works, on tiny runs


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


# ---- tables, front and page, out of results that are made up


def write(folder: Path, method: str, autoattack: float, seed: int = 0, schedule: str = "equal epochs", **changes) -> None:
    job = setting.Job(method, setting.epochs("small", method, schedule), seed)
    attack = {"attack": "pgd-50-10", "robust_accuracy": autoattack + 0.02, "robust_interval": [0, 1]}
    found = {"method": method, "epochs": job.epochs, "seed": seed, "clean_accuracy": 0.5, "pgd": attack, "examples": 200,
             "autoattack": {"robust_accuracy": autoattack, "robust_interval": [autoattack - 0.05, autoattack + 0.06]},
             "images": "abc", "config": setting.config_of("small", job).to_dict(), "data": "cifar10 (x)",
             "hardware": {"device": "CPU", "threads": 1}, "warnings": []}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{job.name}.json").write_text(json.dumps(found | changes))


def cells(comparison: tables.Comparison, schedule: int = 0) -> list[dict[str, str]]:
    _, head, rows = tables.tables(comparison)[schedule]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_table_has_means_and_every_seed_and_the_most_robust_first(tmp_path):
    for seed, value in enumerate((0.2, 0.22, 0.27)):
        write(tmp_path, "fgsm", value, seed, warnings=["epoch 3: suspicious"] if seed == 1 else [])
    write(tmp_path, "liet", 0.24)
    write(tmp_path, "liet", 0.19, schedule="equal cost")
    found = tables.compare("small", [tmp_path])
    first, second = cells(found)
    assert first["method"] == "liet" and first["AutoAttack %"] == "24.0" and first["seeds"] == "0"
    assert second["method"] == "fgsm (the guard warned in 1)" and second["seeds"] == "0, 1, 2"
    assert second["AutoAttack %"] == "23.0 (20.0, 22.0, 27.0)" and second["PGD-50-10 %"] == "25.0 (22.0, 24.0, 29.0)"
    usual = setting.base("small", "fgsm").epochs
    assert (second["epochs"], second["cost of a step"]) == (str(usual), "1.67")
    assert second["cost of the training"] == f"{usual * 5 / 3:.1f}"
    assert [row["method"].split()[0] for row in cells(found, 1)] == ["fgsm", "liet"]
    assert cells(found, 1)[1]["AutoAttack %"] == "19.0"
    assert "Runs so far: 5; seeds: 0, 1, 2" in tables.as_markdown(found) and "11 points" in tables.as_markdown(found)


def test_runs_of_another_setting_or_other_images_are_left_out_and_named(tmp_path):
    for seed in (0, 1):
        write(tmp_path, "fgsm", 0.2, seed)
    write(tmp_path, "fgsm", 0.9, 2, config=setting.base("small", "fgsm", ("epsilon=7/255",)).to_dict())
    write(tmp_path, "fgsm", 0.9, 3, images="others")
    found = tables.compare("small", [tmp_path])
    assert [(row["AutoAttack %"], row["seeds"]) for row in cells(found)] == [("20.0 (20.0, 20.0)", "0, 1")]
    notes = "\n".join(found.notes)
    assert re.search(r"left out, of another setting: .*_seed2.json", notes)
    assert re.search(r"left out, attacked on other images: .*_seed3.json", notes)


def test_the_front_is_what_nothing_beats():
    """Against the definition, on small grids, where many points have a coordinate in common or are the same."""
    rng = random.Random(0)
    for _ in range(300):
        points = {i: (rng.randint(1, 5), rng.randint(0, 5) / 5) for i in range(rng.randint(0, 9))}

        def beaten(mine, points=points):
            return any(c <= mine[0] and a >= mine[1] and (c, a) != mine for c, a in points.values())

        assert tables.pareto(points) == {i for i, point in points.items() if not beaten(point)}


def test_labels_keep_their_order_and_distance_and_stay_near():
    """No other places with the gap are nearer, in squares: against a search by brute force."""
    rng = random.Random(1)
    for _ in range(30):
        places = sorted(rng.randint(0, 6) for _ in range(3))
        found = tables.spread_out([float(p) for p in places], 2)
        assert all(b - a >= 2 - 1e-9 for a, b in itertools.pairwise(found))
        grid = [k / 3 for k in range(-15, 37)]
        away = lambda at, places=places: sum((a - b) ** 2 for a, b in zip(at, places, strict=True))
        best = min(away(at) for at in itertools.product(grid, repeat=3) if at[1] - at[0] >= 2 and at[2] - at[1] >= 2)
        assert away(found) <= best + 1e-9


def test_the_page_needs_no_network(tmp_path):
    for i, method in enumerate(setting.METHODS):
        write(tmp_path, method, 0.1 + i / 200)
    write(tmp_path, "standard", 0.3, schedule="equal cost")
    found = tables.compare("small", [tmp_path])
    tables.write_page(tmp_path / "page.html", found, ["liet <seed 3>: no time left"])
    html = (tmp_path / "page.html").read_text()
    assert html.count("<figure>") == 3 and "liet &lt;seed 3&gt;" in html and "A miniature" in html
    assert set(re.findall(r"(?:src|href)=\"(.{5})", html)) == {"data:"} and not re.search(r"url\(|@import|<script", html)
    for method in setting.METHODS:
        assert f"<th>{method}</th>" in html


# ---- what was measured


def test_the_records_are_what_the_files_say():
    folder = ROOT / "benchmarks/results/methods/small"
    found = tables.compare("small", [folder])
    assert not any(note.startswith("left out") for note in found.notes) and all(found.rows.values())
    records = (ROOT / "benchmarks/RECORDS.md").read_text()
    for line in tables.as_markdown(found).splitlines():
        assert not line.startswith("|") or line in records, line
    for file in folder.glob("*_seed*.json"):
        stored = json.loads(file.read_text())
        config = reading.parse(stored["config"], str(file))
        assert stored["cost"] == setting.cost(config.method, stored["epochs"])


def test_the_advice_says_what_the_files_say():
    """docs/choosing.md: how many runs there are, and for each method the seconds and the memory of a step."""
    folder, text = ROOT / "benchmarks/results/methods/small", (ROOT / "docs/choosing.md").read_text()
    done, every = len(list(folder.glob("*_seed*.json"))), len(methods.wanted("small", list(setting.METHODS), 3))
    assert re.search(rf"of {every} runs {done} (is|are) done", " ".join(text.split()))
    costs = json.loads((folder / "costs_amd_epyc_1threads.json").read_text())["methods"]
    rows = [line.split("|")[2:4] for line in text.splitlines() if re.search(r"` \d\.\d\d", line)]
    told = {m: (float(x), cell) for names, cell in rows for m, x in re.findall(r"`(\w+)` (\d\.\d\d)", names)}
    assert told.keys() == set(setting.METHODS) - {"standard"}
    for method, (ratio, memory) in told.items():
        assert ratio == round(costs[method]["over_fgsm"], 2), method
        ends = [float(number) for number in re.findall(r"\d+", memory)]
        assert min(ends) <= round(costs[method]["peak_memory"] / 1e6) <= max(ends), method
