"""The result files of `benchmarks.reproduce` as the paper's tables and figures, ours beside them.

Accuracies are means over seeds, whatever the hardware; times are never mixed: each hardware has a row of its own."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import paper
from benchmarks.paper import ROOT
from fastrobust.config import reading
from fastrobust.reporting.charts import Line, chart, escape, page, ranged, table
from fastrobust.runtime.errors import FastrobustError
from fastrobust.runtime.files import write_text
from fastrobust.runtime.progress import duration

MISSING = "not measured"


@dataclass(frozen=True)
class Result:
    """A file of the results: a run's summary and metrics, the name of its row, the config it was trained with, the data set
    and the kind of its files, and what exact verification said, or None."""

    row: str
    config: dict
    summary: dict
    history: list[dict]
    data: str = ""
    verified: dict | None = None

    def evaluation(self, epsilon: float | None = None) -> dict | None:
        """At a radius, or the first."""
        found = [e for e in self.summary["evaluations"] if epsilon is None or abs(e["epsilon"] - epsilon) < 1e-9]
        return found[0] if found else None

    def robust(self, epsilon: float | None = None) -> float | None:
        return (self.evaluation(epsilon) or {}).get("robust_accuracy")

    @property
    def clean(self) -> float:
        return self.summary["clean_accuracy"]

    @property
    def seconds(self) -> float:
        return self.summary["train_seconds"]

    @property
    def hardware(self) -> str:
        found, processes = self.summary["hardware"], self.summary.get("processes", 1)
        threads = f"{found['threads']} thread{'s' if found['threads'] != 1 else ''}"
        device = f"{found['device']}, {threads}" if found["device"] == found.get("cpu") else found["device"]
        return device if processes == 1 else f"{processes} \u00d7 {device}"


@dataclass(frozen=True)
class Table:
    title: str
    head: list[str]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()


def file_of(row: paper.Row, seed: int, folder: Path) -> Path:
    return folder / f"{row.name}_seed{seed}.json"


def read_result(file: Path) -> Result:
    try:
        found = json.loads(file.read_text())
        required = [found[key] for key in ("row", "config", "summary", "history")]
        return Result(*required, found.get("data", required[2]["dataset"]), found.get("verified"))
    except (ValueError, KeyError, TypeError):
        raise FastrobustError(f"{file} is damaged: delete it, and the run is read or trained again") from None


def results_of(row: paper.Row, folder: Path) -> list[Result]:
    return [read_result(file) for file in sorted(folder.glob(f"{row.name}_seed*.json"))]


def by_hardware(results: list[Result]) -> list[list[Result]]:
    """Those of one hardware side by side; one empty list if there are none."""
    found: dict[str, list[Result]] = {}
    for one in results:
        found.setdefault(one.hardware, []).append(one)
    return list(found.values()) or [[]]


def trimmed(table: Table) -> Table:
    """Facts that are the same wherever there is a result are said below the table, not in each of its rows."""
    rows, head, said = [list(row) for row in table.rows], list(table.head), []
    for name in [h for h in head if h in FACTS]:
        i = head.index(name)
        values = {row[i] for row in rows} - {""}
        shared = len(rows) > 1 and len(values) == 1 and name != "training"
        if shared or not values:
            said += [f"{name}: {value}" for value in values]
            head.pop(i)
            for row in rows:
                row.pop(i)
    notes = (f"Of all that was measured: {'; '.join(said)}.",) if said else ()
    return Table(table.title, head, rows, notes + table.notes)


# cells


def spread(values: list[float], digits: int = 2) -> str:
    """The mean, and the range where there are several."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def cell(values: list[float | None], digits: int = 2) -> str:
    """In per cent."""
    known = [100 * v for v in values if v is not None]
    return spread(known, digits) if known else MISSING


def told(values: dict, *keys: str) -> list[str]:
    """The paper's figures for these keys, as they are printed there."""
    found = [values.get(key, "") for key in keys]
    return [f"{value:.2f}" if isinstance(value, float) else str(value) for value in found]


def attack_of(results: list[Result]) -> str:
    found = sorted({f"{e['attack']}, n = {e['examples']:,}" for r in results for e in r.summary["evaluations"]})
    return "; ".join(found).replace("-", "\u2011")


FACTS = ["attack", "seeds", "training", "data", "hardware"]


def facts(results: list[Result]) -> list[str]:
    if not results:
        return [""] * len(FACTS)
    times = "; ".join(duration(statistics.fmean(r.seconds for r in same)) for same in by_hardware(results))
    if stopped := sum(r.summary["stopped"] is not None for r in results):
        times += f" ({stopped} of {len(results)} stopped by the guard)"
    data = "; ".join(sorted({r.data for r in results}))
    return [attack_of(results), str(len(results)), times, data, "; ".join(same[0].hardware for same in by_hardware(results))]


def epochs_of(row: paper.Row) -> str:
    return "" if row.config is None else str(reading.load(ROOT / "configs" / row.config, list(row.overrides)).epochs)


# tables


def accuracy_table(
    title: str, rows: list[paper.Row], folder: Path, columns: list[tuple[str, str, str, Callable[[Result], float | None]]]
) -> Table:
    """`columns` are (key of the paper's figure, its heading, our heading, our figure)."""
    cells = []
    for row in rows:
        results = results_of(row, folder)
        pairs = [(told(row.paper, key)[0], cell([get(r) for r in results])) for key, _, _, get in columns]
        cells.append([row.label, *(part for pair in pairs for part in pair), *facts(results)])
    heads = [part for _, theirs, ours, _ in columns for part in (f"paper: {theirs}", f"ours: {ours}")]
    return Table(title, ["", *heads, *FACTS], cells)


CLEAN = ("clean", "clean %", "clean %", lambda r: r.clean)


def table1(scale: str, rows: list[paper.Row], folder: Path) -> Table:
    return accuracy_table(TITLES[scale]["table1"], rows, folder, [CLEAN, ("robust", "PGD %", "PGD %", Result.robust)])


def table2(scale: str, rows: list[paper.Row], folder: Path) -> Table:
    columns = [CLEAN]
    for key, theirs, ours in zip(("robust", "robust1"), paper.RADII["full"], paper.RADII[scale], strict=True):
        columns.append((key, f"PGD % {theirs:g}", f"PGD % {ours:g}", lambda r, e=ours: r.robust(e)))
    if scale == "small":
        return accuracy_table(TITLES[scale]["table2"], rows, folder, columns)

    def verified(r: Result) -> float | None:
        return r.verified and r.verified["verified_accuracy"]

    columns.append(("verified", "verified % 0.1", "verified % 0.1", verified))
    found = accuracy_table(TITLES[scale]["table2"], rows, folder, columns)
    notes = []
    for row in rows:
        for r in results_of(row, folder):
            if v := r.verified:
                counts = ", ".join(f"{v[name]:,} {name}" for name in ("verified", "falsified", "misclassified", "timeout"))
                seed = r.config["seed"]
                notes.append(f"{row.label}, seed {seed}: {counts}; {v['timeout_seconds']:g} s an image. Epsilon 0.1.")
    place = shlex.quote(f"{paper.RUNS}/full/NAME")
    notes.append(f"To verify: fastrobust verify {place} --epsilon 0.1, then this command again.")
    return Table(found.title, found.head, found.rows, tuple(notes))


def table3(scale: str, rows: list[paper.Row], folder: Path) -> Table:
    goal = paper.GOAL[scale]
    cells = []
    for row in rows:
        for results in by_hardware(results_of(row, folder)):
            per_epoch = spread([r.seconds / r.summary["epochs"] for r in results]) if results else MISSING
            minutes = spread([r.seconds / 60 for r in results]) if results else MISSING
            if row.config is None:
                per_epoch = minutes = "not trained here"
            times = [*told(row.paper, "seconds_per_epoch"), per_epoch, *told(row.paper, "minutes"), minutes]
            accuracy = [cell([r.robust() for r in results]) if row.config else "", reached(results, goal)]
            attack, seeds, _, data, hardware = facts(results)
            cells.append([row.label, *told(row.paper, "epochs"), epochs_of(row), *times, *accuracy, attack, seeds, data])
            cells[-1].append(hardware)
    head = ["", "paper: epochs", "ours: epochs", "paper: s/epoch", "ours: s/epoch", "paper: minutes", "ours: minutes"]
    head += ["ours: PGD %", f"reached {goal:.0%}", "attack", "seeds", "data", "hardware"]
    return Table(TITLES[scale]["table3"], head, cells)


def reached(results: list[Result], goal: float) -> str:
    return f"{sum(r.robust() >= goal for r in results)} of {len(results)}" if results else ""


def seconds(scale: str, rows: list[paper.Row], folder: Path) -> Table:
    """Seconds to a robust accuracy: a row per hardware."""
    cells = []
    for row in rows:
        for results in by_hardware(results_of(row, folder)):
            times = spread([r.seconds for r in results], 1) if results else MISSING
            goal = paper.SECONDS[row.name]
            label = f"{row.label} to {goal:.0%}"
            attack, seeds, _, data, hardware = facts(results)
            warm = [w for r in results if (w := warm_up(r)) is not None]
            first = spread(warm, 1) if warm else ""
            accuracy = [cell([r.robust() for r in results]), reached(results, goal)]
            cells.append([label, epochs_of(row), times, first, *accuracy, attack, seeds, data, hardware])
    head = ["", "epochs", "seconds", "of them warm-up", "PGD %", "reached", "attack", "seeds", "data", "hardware"]
    return Table(TITLES[scale]["seconds"], head, cells, (paper.RULE,))


def warm_up(r: Result) -> float | None:
    """How much longer the first pass over the data took than the median of the others, seconds, at least 0."""
    times = [record["seconds"] for record in r.history]
    return max(0.0, times[0] - statistics.median(times[1:])) if len(times) > 1 else None


def table4(scale: str, rows: list[paper.Row], folder: Path) -> Table:
    def first_restart(r: Result) -> float | None:
        return r.evaluation().get("robust_accuracy_after_one_restart")

    columns = [CLEAN, ("first", "PGD\u201150\u20111 %", "PGD\u201150\u20111 %", first_restart)]
    columns.append(("robust", "PGD\u201150\u201110 %", "PGD\u201150\u201110 %", Result.robust))
    return accuracy_table(TITLES[scale]["table4"], rows, folder, columns)


def table5(scale: str, rows: list[paper.Row], folder: Path) -> Table:
    """Minutes an epoch of each phase and hours in all; the runs with mixed precision are Table 4's."""
    cells = []
    for row in rows:
        for results in by_hardware(results_of(row, folder)):
            _, seeds, _, data, hardware = facts(results)
            phases = row.paper["phases"]
            for phase, (epochs, minutes) in enumerate(phases):
                mine = [m for r in results for m in minutes_an_epoch(r, phase)]
                name = f"{row.label}, phase {phase + 1}" if len(phases) > 1 else row.label
                times = [f"{minutes:.2f}", f"{statistics.fmean(mine):.2f}" if mine else MISSING]
                cells.append([name, str(epochs), *times, "", "", seeds, data, hardware])
            hours = spread([r.seconds / 3600 for r in results]) if results else MISSING
            if len(phases) > 1:
                cells.append([f"{row.label}, in all", str(sum(e for e, _ in phases)), "", "", "", "", seeds, data, hardware])
            cells[-1][4:6] = [f"{row.paper['hours']:.2f}", hours]
    head = ["", "epochs", "paper: min/epoch", "ours: min/epoch", "paper: hours", "ours: hours", "seeds", "data", "hardware"]
    return Table(TITLES[scale]["table5"], head, cells)


def minutes_an_epoch(r: Result, phase: int) -> list[float]:
    """Of each pass over the data in a phase; a pass of `free` is several epochs."""
    replays = r.config["method"].get("replays", 1)
    return [record["seconds"] / 60 / replays for record in r.history if record.get("phase") == phase]


# figures


def figure1() -> str:
    """The schedules are functions: nothing is trained."""
    drawn = []
    for title, (schedule, epochs) in paper.SCHEDULES.items():
        points = [(epochs * i / 600, schedule.rate(epochs * i / 600, epochs)) for i in range(601)]
        drawn.append(chart(f"{title}: learning rate", [Line(title, points)], x="epoch"))
    return "".join(drawn)


def figure2(scale: str, rows: list[paper.Row], folder: Path) -> tuple[str, Table]:
    """(two charts, the table behind them)"""
    goal = paper.GOAL[scale]
    groups: dict[str, list[tuple[int, list[Result]]]] = {}
    for row in rows:
        groups.setdefault(row.label, []).append((int(epochs_of(row)), results_of(row, folder)))
    cells, lines = [], {"Robust accuracy": [], "Clean accuracy": []}
    for colour, (label, found) in enumerate(groups.items()):
        done = sorted((epochs, results) for epochs, results in found if results)
        for title, get in (("Robust accuracy", Result.robust), ("Clean accuracy", lambda r: r.clean)):
            values = [(epochs, [get(r) for r in results]) for epochs, results in done]
            lines[title].append(Line.over_seeds(label, values, colour))
        means = [(epochs, statistics.fmean(r.robust() for r in results)) for epochs, results in done]
        first = next((str(epochs) for epochs, mean in means if mean >= goal), "not reached" if done else MISSING)
        for epochs, results in found:
            accuracies = [cell([r.robust() for r in results]), cell([r.clean for r in results])]
            attack, seeds, _, data, hardware = facts(results)
            cells.append([label, str(epochs), *accuracies, "", "", attack, seeds, data, hardware])
        cells[-len(found)][4:6] = [str(paper.FIRST_TO_45[label]), first]
    head = ["", "epochs", "robust %", "clean %", "paper: epochs to 45%", f"ours: epochs to {goal:.0%}"]
    head += [name for name in FACTS if name != "training"]
    dashed = [(goal, f"{goal:.0%}")]
    drawn = "".join(
        chart(title, of, x="epochs", percent=True, levels=dashed if title.startswith("R") else ())
        for title, of in lines.items()
    )
    measured = any(line.points for line in lines["Robust accuracy"])
    return drawn if measured else "", Table(TITLES[scale]["figure2"], head, cells, (BAND,))


BAND = "Points: the mean over seeds. Bands and brackets: from the lowest to the highest seed."
TITLES = {
    "full": {
        "table1": "Table 1: CIFAR-10 at epsilon 8/255",
        "table2": "Table 2: MNIST, trained at epsilon 0.3",
        "table3": "Table 3: time to 45% robust accuracy on CIFAR-10 (paper: one 2080 Ti)",
        "table4": "Table 4: ImageNet",
        "table5": "Table 5: ImageNet, time (paper: four 2080 Ti)",
        "figure1": "Figure 1: learning-rate schedules",
        "figure2": "Figure 2: CIFAR-10, accuracy against the number of epochs",
        "seconds": "Seconds to a robust accuracy (ours: the paper has no such figure)",
    },
    "small": {
        "table1": "Table 1 in miniature: Fashion-MNIST at epsilon 0.25 (paper: CIFAR-10)",
        "table2": "Table 2 in miniature: Fashion-MNIST, trained at epsilon 0.25 (paper: MNIST)",
        "table3": "Table 3 in miniature: time to 50% robust accuracy (paper: 45% on CIFAR-10)",
        "figure1": "Figure 1: learning-rate schedules",
        "figure2": "Figure 2 in miniature: accuracy against the number of epochs (paper: CIFAR-10)",
    },
}


TABLES = {"table1": table1, "table2": table2, "table3": table3, "table4": table4, "table5": table5, "seconds": seconds}


def build(names: list[str], folder: Path, scale: str) -> list[tuple[str, str, Table | None]]:
    """(title, charts as HTML, table or None) of everything asked for, out of the result files."""
    found = []
    for name in names:
        rows, title = paper.ROWS[scale].get(name, []), TITLES[scale][name]
        if name == "figure1":
            found.append((title, figure1(), None))
        elif name == "figure2":
            drawn, content = figure2(scale, rows, folder)
            found.append((title, drawn, trimmed(content)))
        else:
            found.append((title, "", trimmed(TABLES[name](scale, rows, folder))))
    return found


def write_page(file: Path, found: list[tuple[str, str, Table | None]], scale: str, open_rows: list[str]) -> None:
    title = "The paper's tables and figures" + (" in miniature" if scale == "small" else "")
    parts = [f"<h1>{title}</h1>"]
    if scale == "small":
        parts.append(f'<p class="warn">{escape(paper.MINIATURE)}</p>')
    for heading, drawn, content in found:
        parts.append(f"<h2>{escape(heading)}</h2>")
        parts.append(f'<div class="grid">{drawn}</div>' if drawn else "")
        if content:
            parts.append(table([list(map(ranged, row)) for row in content.rows], list(map(escape, content.head))))
            parts += [f'<p class="note">{escape(note)}</p>' for note in content.notes]
    parts += [f'<p class="note">open: {escape(line)}</p>' for line in open_rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, page(title, "\n".join(parts)))
