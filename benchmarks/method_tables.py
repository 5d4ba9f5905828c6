"""The result files of `benchmarks.methods` as tables, the Pareto front, and a page with the plot.

Means are over seeds of one setting and one set of test images; what is of another is named and left out."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from benchmarks import method_setting as setting
from benchmarks.method_setting import METHODS, REFERENCE, RULE, SCHEDULES, Job
from fastrobust.config import reading
from fastrobust.reporting.charts import escape, framed, page, table
from fastrobust.runtime.errors import FastrobustError
from fastrobust.runtime.files import write_text

SCALES = {
    "small": "A miniature, and no claim about CIFAR-10: 4,000 training images, an eighth of the ResNet-18's channels, "
    "minutes on one CPU core. It says what these methods do in a short training of a small network.",
    "full": "CIFAR-10, the paper's PreActResNet-18.",
}


@dataclass(frozen=True)
class Result:
    """A file of the results. Accuracies are shares; `images` and `setting` are digests."""

    job: Job
    clean: float
    pgd: float
    autoattack: float
    examples: int
    interval: tuple[float, float]  # of AutoAttack's, 95 %
    attack: str  # the weaker one
    images: str
    setting: str
    data: str
    hardware: str
    warnings: int
    file: Path


@dataclass(frozen=True)
class Row:
    """One method with one schedule; `results` holds a seed each. cost: of the training, in epochs of standard training."""

    method: str
    epochs: int
    step_cost: float
    cost: float
    results: list[Result]

    @property
    def key(self) -> tuple[str, int]:
        return self.method, self.epochs

    @property
    def mean(self) -> float:
        return statistics.fmean(r.autoattack for r in self.results)


@dataclass(frozen=True)
class Comparison:
    """rows: of each schedule, the most robust first. front: the names of the jobs (method, epochs) on the Pareto front.
    measured: what `--costs` wrote, one for each device."""

    scale: str
    rows: dict[str, list[Row]]
    front: set[tuple[str, int]]
    measured: list[dict]
    notes: list[str] = field(default_factory=list)


def read_result(file: Path) -> Result:
    try:
        found = json.loads(file.read_text())
        return Result(
            job=Job(found["method"], found["epochs"], found["seed"]),
            clean=found["clean_accuracy"],
            pgd=found["pgd"]["robust_accuracy"],
            autoattack=found["autoattack"]["robust_accuracy"],
            examples=found["examples"],
            interval=tuple(found["autoattack"]["robust_interval"]),
            attack=found["pgd"]["attack"],
            images=found["images"],
            setting=setting.digest(reading.parse(found["config"], str(file))),
            data=found["data"],
            hardware=found["hardware"]["device"],
            warnings=len(found["warnings"]),
            file=file,
        )
    except (ValueError, KeyError, TypeError):
        raise FastrobustError(f"{file} is damaged: delete it, and the run is read or trained again") from None


def read_all(folders: Sequence[Path]) -> list[Result]:
    """One for each job: of those that stand in several folders the first folder's. Raises FastrobustError."""
    found: dict[Job, Result] = {}
    for folder in folders:
        for file in sorted(folder.glob("*_seed*.json")):
            result = read_result(file)
            found.setdefault(result.job, result)
    return list(found.values())


def of_today(scale: str, result: Result) -> bool:
    """Whether it was made with the setting that the scale has today."""
    job = result.job
    return job.method in METHODS and result.setting in setting.digests(setting.config_of(scale, job))


def pareto(points: dict) -> set:
    """Of points {name: (cost, accuracy)} those that no other one beats: none is as cheap and as accurate, and better in one
    of the two."""
    front, best = set(), float("-inf")
    for cost in sorted({cost for cost, _ in points.values()}):
        highest = max(accuracy for c, accuracy in points.values() if c == cost)
        if highest > best:
            best = highest
            front |= {name for name, point in points.items() if point == (cost, highest)}
    return front


def compare(scale: str, folders: Sequence[Path], methods: Iterable[str] = tuple(METHODS)) -> Comparison:
    """Raises FastrobustError for damaged files."""
    methods = list(methods)
    every = [r for r in read_all(folders) if r.job.method in methods]
    of_setting = [r for r in every if of_today(scale, r)]
    foreign = [r.file for r in every if r not in of_setting]
    sets = {r.images: sum(q.images == r.images for q in of_setting) for r in of_setting}
    images = max(sets, key=sets.get, default=None)  # those that most runs were attacked on
    kept = [r for r in of_setting if r.images == images]
    other = [r.file for r in of_setting if r.images != images]
    rows: dict[str, list[Row]] = {}
    for schedule in SCHEDULES:
        of_schedule = []
        for method in methods:
            epochs = setting.epochs(scale, method, schedule)
            seeds = sorted((r for r in kept if r.job.method == method and r.job.epochs == epochs), key=lambda r: r.job.seed)
            section = setting.base(scale, method).method
            if seeds:
                forward = setting.passes(section) / 3
                of_schedule.append(Row(method, epochs, forward, setting.cost(section, epochs), seeds))
        rows[schedule] = sorted(of_schedule, key=lambda row: -row.mean)
    points = {row.key: (row.cost, row.mean) for of in rows.values() for row in of}
    measured = [json.loads(file.read_text()) for folder in folders for file in sorted(folder.glob("costs_*.json"))]
    notes = notes_of(scale, kept, len(methods))
    notes += [f"left out, of another setting: {file}" for file in foreign]
    notes += [f"left out, attacked on other images: {file}" for file in other]
    return Comparison(scale, rows, pareto(points), measured, notes)


def notes_of(scale: str, results: list[Result], methods: int) -> list[str]:
    notes = [SCALES[scale], RULE]
    if results:
        first, seeds = results[0], sorted({r.job.seed for r in results})
        low, high = max((r.interval for r in results), key=lambda ends: ends[1] - ends[0])
        notes.append(
            f"Runs so far: {len(results)}; seeds: {', '.join(map(str, seeds))}. {first.data}, {first.examples} test images, "
            f"the same for all (digest {first.images[:12]}). The 95 % interval of one run's AutoAttack accuracy is as wide "
            f"as {100 * (high - low):.0f} points: what differs by less in one seed may be chance."
        )
    return notes


# cells


def percent(values: list[float]) -> str:
    """The mean, and each seed's where there are several."""
    mean = f"{100 * statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({', '.join(f'{100 * v:.1f}' for v in values)})"


def tables(comparison: Comparison) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of each schedule."""
    return [(title, *table_of(comparison, rows)) for title, rows in comparison.rows.items()]


def table_of(comparison: Comparison, rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    attack = next((r.attack.upper() for row in rows for r in row.results), "PGD")
    head = ["method", "AutoAttack %", f"{attack} %", "clean %", "seeds", "epochs", "cost of a step", "cost of the training"]
    for found in comparison.measured:
        device, threads = found["hardware"]["device"], found["hardware"]["threads"]
        device += "" if found["clock"] == "perf_counter" else ", 1 thread" if threads == 1 else f", {threads} threads"
        head += [f"seconds of a step, × {REFERENCE} ({device})", "peak memory, MB"]
    head.append("on the front")
    cells = []
    for row in rows:
        accuracies = [percent([getattr(r, key) for r in row.results]) for key in ("autoattack", "pgd", "clean")]
        seeds = ", ".join(str(r.job.seed) for r in row.results)
        cells.append([row.method, *accuracies, seeds, str(row.epochs), f"{row.step_cost:.2f}", f"{row.cost:.1f}"])
        for found in comparison.measured:
            one = found["methods"].get(row.method)
            cells[-1] += [f"{one['over_fgsm']:.2f}", f"{one['peak_memory'] / 1e6:.0f}"] if one else ["", ""]
        warned = sum(r.warnings > 0 for r in row.results)
        cells[-1][0] += f" (the guard warned in {warned})" if warned else ""
        cells[-1].append("yes" if row.key in comparison.front else "")
    return head, cells


def as_markdown(comparison: Comparison) -> str:
    parts = []
    for title, head, rows in tables(comparison):
        lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
        lines.insert(1, "|" + "---|" * len(head))
        parts.append(f"{title.capitalize()}:\n\n" + "\n".join(lines))
    return "\n\n".join([*parts, *comparison.notes])


# the page


def spread_out(places: list[float], gap: float) -> list[float]:
    """Places for labels: in the order of `places` (ascending), at least `gap` apart, as near to them as that allows."""
    groups: list[list[float]] = []  # [sum of (place - offset), count]
    for i, place in enumerate(places):
        groups.append([place - i * gap, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, count = groups.pop()
            groups[-1] = [groups[-1][0] + total, groups[-1][1] + count]
    starts = [total / count for total, count in groups for _ in range(int(count))]
    return [start + i * gap for i, start in enumerate(starts)]


def plot(comparison: Comparison) -> Figure:
    """AutoAttack accuracy, the mean over seeds, against the cost of a training. Runs of equal epochs are filled and named,
    those of equal cost are named where they are on the front."""
    equal, others = comparison.rows[SCHEDULES[0]], comparison.rows[SCHEDULES[1]]
    rows = equal + [row for row in others if row not in equal]
    figure = Figure(figsize=(10, 0.14 * len(rows) + 3.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="cost of the training, in epochs of standard training")
    axes.set_ylabel("accuracy under AutoAttack")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    on = [row for row in rows if row.key in comparison.front]
    axes.step(*zip(*sorted({(r.cost, r.mean) for r in on}), strict=True), where="post", color="C1", label="Pareto front")
    for label, filled in zip(SCHEDULES, ("full", "none"), strict=True):
        axes.plot([], [], "o", color="C0", fillstyle=filled, markersize=5, label=label)
    highest = max(row.mean for row in rows)
    every = [row.mean for row in rows if row.mean >= highest / 2]  # the others stand at the lower edge
    margin = max(0.01, 0.08 * (max(every) - min(every)))
    low, high = max(0.0, min(every) - 2 * margin), max(every) + margin
    for row in rows:
        look = {"color": "C1" if row in on else "C0", "fillstyle": "full" if row in equal else "none", "markersize": 5}
        axes.plot(row.cost, max(row.mean, low), "v" if row.mean < low else "o", clip_on=False, **look)
    axes.set_ylim(low, high)
    axes.set_xlim(min(row.cost for row in rows) / 1.2, max(row.cost for row in rows) * 1.6)
    gap = (high - low) * 0.16 / figure.get_figheight()
    arrow = {"arrowstyle": "-", "color": "grey", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
    white = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
    for group in near([row for row in rows if row in equal or row in on]):
        right = max(row.cost for row in group) * 1.06
        at = [max(row.mean, low) for row in group]
        for row, here, place in zip(group, at, spread_out(at, gap), strict=True):
            name = row.method if row in equal else f"{row.method}, {row.epochs} epochs"
            name += f": {row.mean:.1%}" if row.mean < low else ""
            look = {"va": "center", "fontsize": 8, "bbox": white, "arrowprops": arrow}
            axes.annotate(name, (row.cost, here), (right, place), **look)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: f"{x:g}" if f"{x:g}"[0] in "25" else ""))
    axes.tick_params(which="both", labelsize="medium")
    axes.yaxis.set_major_formatter(PercentFormatter(1, 1))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def near(rows: list[Row]) -> list[list[Row]]:
    """In groups whose costs are too near for labels side by side, each in ascending order of accuracy."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row.cost):
        if not groups or row.cost > 1.3 * groups[-1][0].cost:
            groups.append([])
        groups[-1].append(row)
    return [sorted(group, key=lambda row: row.mean) for group in groups]


def ranking(rows: list[Row]) -> Figure:
    """A line for each method, the most robust above: every seed under AutoAttack and PGD, and without an attack."""
    figure = Figure(figsize=(10, 0.24 * len(rows) + 1.4), layout="constrained")
    axes = figure.add_subplot(xlabel="accuracy")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    kinds = {"autoattack": ("AutoAttack", "o", "C0"), "pgd": ("PGD", "|", "C1"), "clean": ("clean", ".", "grey")}
    for key, (label, marker, colour) in kinds.items():
        points = [(getattr(r, key), -i) for i, row in enumerate(rows) for r in row.results]
        axes.plot(*zip(*points, strict=True), marker, color=colour, label=label, alpha=0.8)
    axes.set_yticks([-i for i in range(len(rows))], [f"{row.method}, {row.epochs} epochs" for row in rows], fontsize=8)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def wide(figure: str) -> str:
    """A figure that is moved sideways on a phone, instead of being too small to read."""
    return f'<div class="scroll"><div style="min-width: 46rem">{figure}</div></div>'


def write_page(file: Path, comparison: Comparison, left_open: Sequence[str] = ()) -> None:
    title = f"Training methods by robustness and cost{' (small)' if comparison.scale == 'small' else ''}"
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="warn">{escape(comparison.notes[0])}</p>']
    if any(comparison.rows.values()):
        parts.append(wide(framed("Accuracy under AutoAttack against cost", plot(comparison))))
    for (name, head, cells), rows in zip(tables(comparison), comparison.rows.values(), strict=True):
        parts.append(f"<h2>{escape(name.capitalize())}</h2>")
        drawn = wide(framed(f"{name.capitalize()}: each seed", ranking(rows))) if rows else "<p>No run yet.</p>"
        parts += [drawn, table([list(map(escape, row)) for row in cells], list(map(escape, head))) if rows else ""]
    parts += [f'<p class="note">{escape(note)}</p>' for note in comparison.notes[1:]]
    parts += [f'<p class="note">open: {escape(line)}</p>' for line in left_open]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, page(title, "\n".join(parts)))
