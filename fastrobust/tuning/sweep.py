"""A grid of runs (the sweep command; `fastrobust sweep --help` shows what a sweep file looks like)."""

import csv
import io
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from rich.console import Console
from rich.table import Table

from fastrobust.config import reading
from fastrobust.config.fields import FolderName, Section
from fastrobust.config.keys import of
from fastrobust.config.numbers import ball_in_words, parse_number
from fastrobust.config.schema import Config
from fastrobust.config.sections import Place
from fastrobust.reporting.charts import Line, chart, escape, page, ranged, table
from fastrobust.reporting.stored import Run, read_run
from fastrobust.runtime import distributed, run_directory
from fastrobust.runtime.command import interruptible
from fastrobust.runtime.errors import ConfigError, FastrobustError, RunError, installing
from fastrobust.runtime.files import explained, write_json, write_text
from fastrobust.runtime.interrupt import Interrupted
from fastrobust.runtime.progress import Progress, duration
from fastrobust.train.start import run

MOST_POINTS = 10_000
Values = Annotated[list[Any], Field(min_length=1)]  # of the key that the axis is called after
Bundles = Annotated[dict[str, dict[str, Any]], Field(min_length=1)]  # label -> {key: value, ...}
Grid = dict[str, Values | Bundles]  # by axis
COLUMNS = (  # of results.csv, after the axes
    "seed", "clean_accuracy", "robust_accuracy", "examples", "attack", "attack_norm", "attack_epsilon", "epochs",
    "train_seconds", "stopped", "run",
)  # fmt: skip


class Sweep(Section):
    """`grids`, in the place of `grid`: several with the same axes, for values of one axis that depend on another's."""

    name: FolderName
    config: str
    output: Place = "runs"
    set: dict[str, Any] = Field(default_factory=dict)
    grid: Grid = Field(default_factory=dict)
    grids: list[Grid] = Field(default_factory=list)
    seeds: Annotated[int, Field(ge=1, le=1000)] | Annotated[list[int], Field(min_length=1)] = 1

    @property
    def each_seed(self) -> list[int]:
        return list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    @property
    def directory(self) -> Path:
        return Path(self.output) / self.name


@dataclass(frozen=True)
class Point:
    """`labels` says where on each axis (seed not included) the run stands."""

    labels: tuple[tuple[str, str], ...]
    seed: int
    config: Config

    @property
    def directory(self) -> Path:
        return Path(self.config.output) / self.config.name


def read_sweep(path: str | Path) -> Sweep:
    """Raises ConfigError."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"sweep file {path} does not exist")
    with explained(f"sweep file {path} cannot be read"):
        data = reading.read_yaml(path.read_text(encoding="utf-8"), str(path))
    data.setdefault("name", path.stem)
    if "config" not in data:
        look = f"`fastrobust sweep --help` shows a sweep file; a config alone is trained by `fastrobust train {path}`"
        raise ConfigError(f"{path} names no `config:` that its runs have in common: {look}")
    try:
        return Sweep.model_validate(data)
    except ValidationError as error:
        raise reading.refused(error, str(path), of(Sweep)) from None


def places(sweep: Sweep) -> list[tuple[tuple[tuple[str, str], ...], dict[str, Any]]]:
    """Every place on the grids: (its label on each axis, the keys of the config that are changed there). ConfigError."""
    if sweep.grid and sweep.grids:
        raise ConfigError("a sweep has either `grid` or `grids`")
    for key in ("output", "name", "seed"):
        if any(key in keys for keys in (sweep.set, sweep.grid, *sweep.grids)):
            written = "seeds" if key == "seed" else key
            raise ConfigError(f"{key}: a sweep sets it for every run: write `{written}:` at the top")
    for axis in itertools.chain(sweep.grid, *sweep.grids):
        if axis in COLUMNS:
            raise ConfigError(f"grid.{axis}: results.csv has a column {axis} of its own: give the axis another name")
    if any(grid.keys() != sweep.grids[0].keys() for grid in sweep.grids):
        raise ConfigError("grids: all must have the same axes")
    grids = [[choices(*axis) for axis in grid.items()] for grid in sweep.grids or [sweep.grid]]
    if (size := sum(math.prod(map(len, axes)) for axes in grids) * len(sweep.each_seed)) > MOST_POINTS:
        raise ConfigError(f"the sweep has {size} points; at most {MOST_POINTS} are trained")
    every = itertools.chain.from_iterable(itertools.product(*axes) for axes in grids)
    return [
        (
            tuple((axis, label) for axis, label, _ in place),
            together({"`set`": sweep.set} | {f"the axis {axis}": keys for axis, _, keys in place}),
        )
        for place in every
    ]


def together(sources: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The keys of all, in their order. ConfigError where a later source would replace what an earlier one sets."""
    for (a, earlier), (b, later) in itertools.combinations(sources.items(), 2):
        for key, other in itertools.product(earlier, later):
            if f"{key}.".startswith(f"{other}."):
                part = "" if key == other else f" (as a part of {other})"
                raise ConfigError(f"{key}: both {a} and {b} set it{part}: leave it out of one")
    return {key: value for keys in sources.values() for key, value in keys.items()}


def choices(axis: str, values: Values | Bundles) -> list[tuple[str, str, dict[str, Any]]]:
    """(axis, label, keys) of each value."""
    bundles = values if isinstance(values, dict) else {as_text(value): {axis: value} for value in values}
    if len(bundles) < len(values):
        raise ConfigError(f"grid.{axis}: a value stands there twice")
    return [(axis, label, keys) for label, keys in bundles.items()]


def as_overrides(keys: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in keys.items()]


def points(sweep: Sweep) -> list[Point]:
    """Every point of the sweep, the seeds of one place side by side. Raises ConfigError."""
    found: dict[str, Point] = {}
    for (labels, keys), seed in itertools.product(places(sweep), sweep.each_seed):
        parts = [f"{axis.split('.')[-1]}-{label}" for axis, label in labels] + [f"seed-{seed}"]
        name = "_".join(re.sub(r"[^A-Za-z0-9._]+", "-", part) for part in parts)
        if name in found:
            raise ConfigError(f"two points of the sweep would be called {name}: name the values of an axis `name: {{keys}}`")
        of_run = {"seed": seed, "name": name, "output": str(sweep.directory)}
        found[name] = Point(labels, seed, reading.load(sweep.config, as_overrides(keys | of_run)))
    return list(found.values())


def as_text(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(as_text(v) for v in value.values())
    return "-".join(map(as_text, value)) if isinstance(value, list) else str(value)


def compare(finished: list[Point]) -> None:
    """Refuse finished runs of other settings than the sweep's, and say where they were evaluated otherwise. RunError."""
    kept: dict[str, None] = {}
    for point in finished:
        stored = run_directory.open_run(point.directory)[1]
        lines = reading.differences(stored, point.config, ("in the run", "in the sweep"))
        if odd := [line for line in lines if reading.is_binding(line)]:
            told = f"{point.directory} was trained with another config:\n  " + "\n  ".join(odd[:8])
            raise RunError(f"{told}\nUndo the change, give the sweep another `name:`, or move the run away")
        kept |= dict.fromkeys(line for line in lines if line.startswith(("evaluation.", "data.path:")))
    if kept:
        print("\n  ".join(["note: finished runs keep their evaluation:", *list(kept)[:8]]), flush=True)


def train_point(config: Config) -> None:
    """Train and evaluate one run: from the start, from its checkpoint, or not at all if it is finished."""
    directory = Path(config.output) / config.name
    run(config, directory, distributed.pick_device(config.device), distributed.ALONE, again=True)


def train_here(sweep: Sweep, todo: list[Point], everything: list[Point]) -> dict[str, str]:
    """Train one after the other. Returns what went wrong, by run name; the result is written after every run."""
    failed: dict[str, str] = {}
    for i, point in enumerate(todo):
        print(f"[{i + 1}/{len(todo)}] {point.config.name}", flush=True)
        try:
            train_point(point.config)
        except Interrupted as error:
            stop = FastrobustError(f"{error}\nor with the whole sweep: the same command goes on")
            stop.status = error.status
            raise stop from None
        except FastrobustError as error:
            failed[point.config.name] = str(error)
            print(f"error: {error}", file=sys.stderr, flush=True)
        write_results(sweep, everything)
    return failed


def submit(sweep: Sweep, todo: list[Point], cluster: str, options: list[str]) -> dict[str, str]:
    """Hand the runs to a scheduler through submitit and wait for them. Slurm's go on if the wait is interrupted; those
    that an earlier call submitted and that are not over are waited for, not submitted again."""

    try:
        import submitit
    except ImportError:
        raise ConfigError(f"--cluster needs submitit: {installing('slurm')}") from None
    folder, ledger = sweep.directory / "jobs", sweep.directory / "submitted.json"
    with explained(f"{folder} cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster)
        given = dict(option.partition("=")[::2] for option in options)
        executor.update_parameters(name=sweep.name, **{k: reading.read_yaml(f"v: {v}", k)["v"] for k, v in given.items()})
    except (ValueError, TypeError, NameError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"--cluster {cluster} {' '.join(options)}: {error}") from None
    try:
        before = dict(json.loads(ledger.read_text())) if ledger.exists() else {}
    except (ValueError, TypeError):
        raise RunError(f"{ledger} is damaged: delete it once no job of this sweep is queued") from None
    jobs = {}
    for point in todo if cluster == "slurm" else []:
        if job_id := before.get(point.config.name):
            job = submitit.SlurmJob(folder=folder, job_id=job_id)
            if not job.done(force_check=True):
                jobs[point.config.name] = job
    new = [point for point in todo if point.config.name not in jobs]
    submitted = executor.map_array(train_point, [point.config for point in new]) if new else []
    jobs |= {point.config.name: job for point, job in zip(new, submitted, strict=True)}
    write_json(ledger, before | {name: job.job_id for name, job in jobs.items()})
    print(f"{len(new)} jobs submitted, {len(jobs) - len(new)} still at work; their logs are in {folder}/", flush=True)
    failed, waiting = {}, dict(jobs)
    with Progress("jobs", len(jobs)) as bar:
        while waiting:
            for name, job in list(waiting.items()):
                if job.done():
                    if (error := job.exception()) is not None:
                        failed[name] = reason(error)
                    del waiting[name]
                    bar.advance(1, name)
            if waiting:
                time.sleep(1)
    return failed


def reason(error: BaseException) -> str:
    """What a job died of: the last line that names an exception, or else what submitit says."""
    lines = [line.strip() for line in str(error).splitlines()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Interrupted|Exception)\b: ", line)]
    return (named[-1] if named else " ".join(lines))[:500]


def gather(everything: list[Point]) -> dict[tuple, list[Run]]:
    """The finished runs by place on the grid, in the grid's order. A damaged one raises RunError."""
    found: dict[tuple, list[Run]] = {point.labels: [] for point in everything}
    for point in everything:
        if (point.directory / run_directory.SUMMARY).exists():
            found[point.labels].append(read_run(point.directory))
    return found


def spread(values: list[float]) -> str:
    """`43.1% (42.0 to 44.3)`: the mean, and the range where there are several."""
    mean = f"{statistics.fmean(values):.2%}"
    return mean if len(values) == 1 else f"{mean} ({min(values) * 100:.2f} to {max(values) * 100:.2f})"


def by_attack(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs whose accuracies may be compared, by the attack, the ball and the test images in words."""
    found: dict[tuple, list[Run]] = {}
    for one in runs:
        e = one.summary.evaluations[0]
        words = f"{e.attack}, {ball_in_words(e.epsilon, e.norm)}, n = {e.examples:,}"
        found.setdefault((words, one.summary.test_images), []).append(one)
    told = [words for words, _ in found]
    return {w + (f", images {images}"[:16] if told.count(w) > 1 else ""): some for (w, images), some in found.items()}


def rows_of(results: dict[tuple, list[Run]]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of the table: a row per place on the grid and attack; one without finished runs is short."""
    rows = []
    for labels, everyone in results.items():
        place = [label for _, label in labels]
        rows += [] if everyone else [[*place, "0"]]
        for words, runs in by_attack(everyone).items():
            summaries = [r.summary for r in runs]
            rows.append([*place, str(len(runs))])
            rows[-1] += [
                spread([s.clean_accuracy for s in summaries]),
                spread([s.evaluations[0].robust_accuracy for s in summaries]),
                words,
                duration(statistics.fmean(s.train_seconds for s in summaries)),
                str(sum(s.stopped is not None for s in summaries) or ""),
            ]
    heads = ["seeds", "clean, mean (range)", "robust, mean (range)", "attack", "training", "stopped by the guard"]
    return [axis for axis, _ in next(iter(results), ())] + heads, rows


def figures(results: dict[tuple, list[Run]]) -> list[str]:
    """For every axis of numbers: clean and robust accuracy along it, a line for each combination of the others."""
    drawn, mixed = [], any(len(by_attack(runs)) > 1 for runs in results.values())
    for i, (axis, _) in enumerate(next(iter(results), ())):
        groups: dict[str, list[tuple[float, list[Run]]]] = {}
        try:
            for labels, runs in results.items():
                others = ", ".join(f"{a.split('.')[-1]} {label}" for k, (a, label) in enumerate(labels) if k != i) or "all"
                for words, some in by_attack(runs).items():
                    name = f"{others}, {words}" if mixed else others
                    groups.setdefault(name, []).append((float(parse_number(labels[i][1])), some))
        except (ValueError, TypeError):
            continue
        if not any(len(found) > 1 for found in groups.values()):
            continue
        for title, get in (
            ("Robust accuracy", lambda r: r.summary.evaluations[0].robust_accuracy),
            ("Clean accuracy", lambda r: r.summary.clean_accuracy),
        ):
            values = {others: [(x, [get(r) for r in runs]) for x, runs in found] for others, found in groups.items()}
            drawn.append(
                chart(title, [Line.over_seeds(*of, k) for k, of in enumerate(values.items())], x=axis, percent=True)
            )
    return drawn


def write_results(sweep: Sweep, everything: list[Point]) -> tuple[list[str], list[list[str]]]:
    """`results.csv`, a row per finished run, and `results.html`. Gives what `rows_of` does."""
    results, text = gather(everything), io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*(axis for axis, _ in everything[0].labels), *COLUMNS])
    for labels, runs in results.items():
        for one in runs:
            s, e = one.summary, one.summary.evaluations[0]
            row = [
                s.clean_accuracy,
                e.robust_accuracy,
                e.examples,
                e.attack,
                e.norm,
                e.epsilon,
                s.epochs,
                s.train_seconds,
                s.stopped,
            ]
            writer.writerow([*(label for _, label in labels), one.config.seed, *row, one.name])
    sweep.directory.mkdir(parents=True, exist_ok=True)
    write_text(sweep.directory / "results.csv", text.getvalue())
    head, rows = rows_of(results)
    finished = [one for runs in results.values() for one in runs]
    hardware = sorted({str(one.environment.hardware.get("device", "?")) for one in finished})
    body = f'<h1>Sweep {escape(sweep.name)}</h1><div class="grid">{"".join(figures(results))}</div>'
    body += f"<p>{len(finished)} of {len(everything)} runs are finished. Bands and brackets: the range over seeds.</p>"
    body += table([list(map(ranged, row)) for row in rows], list(map(escape, head)))
    body += f'<p class="note">hardware: {escape(", ".join(hardware) or "none yet")}</p>'
    write_text(sweep.directory / "results.html", page(f"Sweep {sweep.name}", body))
    return head, rows


def command(arguments) -> int:
    """The sweep command."""
    sweep = read_sweep(arguments.sweep)
    everything = points(sweep)
    done = {point.config.name for point in everything if (point.directory / run_directory.SUMMARY).exists()}
    todo = [point for point in everything if point.config.name not in done]
    compare([point for point in everything if point.config.name in done])
    if arguments.dry_run:
        for point in everything:
            print(f"{point.directory}  {'finished' if point.config.name in done else 'open'}")
        print(f"{len(everything)} runs, {len(todo)} of them open; nothing was written")
        return 0
    try:
        if arguments.cluster and todo:
            failed = interruptible(lambda: submit(sweep, todo, arguments.cluster, arguments.options))
        else:
            failed = interruptible(lambda: train_here(sweep, todo, everything))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on with the sweep") from None
    head, rows = write_results(sweep, everything)
    shown = Table(*head, title=f"sweep {sweep.name}", title_justify="left")
    for row in rows:
        shown.add_row(*row)
    Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140).print(shown)
    print(f"files in {sweep.directory}/: results.html, results.csv, and the runs")
    for name, why in failed.items():
        print(f"error: {name}: {why}", file=sys.stderr)
    return 1 if failed else 0
