"""The comparison of training methods: what is trained for how long, and what the tables, the Pareto front, the page, the
records and the advice say."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import pytest
from method_results import write

from benchmarks import method_setting as setting
from benchmarks import method_tables as tables
from benchmarks import methods
from fastrobust.config import parts, reading

ROOT = Path(__file__).parents[2]
SCALES = list(setting.FILES)

# ---- what is compared


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


# ---- tables, front and page, out of results that are made up


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
