"""The paper's tables and figures, ours beside them:

    python -m benchmarks.reproduce table1 table3 --minutes 60 --seeds 3
    python -m benchmarks.reproduce --scale small          # a miniature for a CPU: minutes, and no reproduction

Every run is trained, evaluated and written to a file of its own as it ends, the most telling first:
a call that was interrupted, or ran out of its minutes, goes on when it is repeated, on another machine too if it has
the files of `--results`. Unfinished runs resume from `runs/reproduce/`. What was measured for benchmarks/RECORDS.md:

    python -m benchmarks.reproduce --scale small --show --results benchmarks/results/reproduce"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import paper
from fastrobust import config as config_module
from fastrobust import run, schedules, sweep
from fastrobust.charts import Line, chart, escape, page, table
from fastrobust.cli import main_with_errors
from fastrobust.errors import ConfigError, DataError, FastrobustError
from fastrobust.evaluate import count
from fastrobust.evaluation import describe
from fastrobust.progress import duration
from fastrobust.stored import read_run
from fastrobust.trainer import Interrupted

ROOT = Path(__file__).parent.parent
RUNS = Path("runs/reproduce")


@dataclass(frozen=True)
class Result:
    """A file of the results: a run's summary and metrics, the name of its row, and the config it was trained with."""

    row: str
    config: dict
    summary: dict
    history: list[dict]

    def robust(self, epsilon: float | None = None) -> float | None:
        """Robust accuracy at a radius, or at the first that was evaluated."""
        found = [e for e in self.summary["evaluations"] if epsilon is None or abs(e["epsilon"] - epsilon) < 1e-9]
        return found[0]["robust_accuracy"] if found else None


def config_of(row: paper.Row, seed: int, scale: str, device: str, data: str | None):
    overrides = [*row.overrides, f"seed={seed}", f"name={row.name}_seed{seed}", f"output={RUNS / scale}"]
    overrides += [f"device={device}"] + ([f"data.path={json.dumps(data)}"] if data else [])
    return config_module.load(ROOT / "configs" / row.config, overrides)


def file_of(row: paper.Row, seed: int, folder: Path) -> Path:
    return folder / f"{row.name}_seed{seed}.json"


def train(row: paper.Row, seed: int, folder: Path, scale: str, device: str, data: str | None) -> None:
    """Train, evaluate, and write the result. Raises FastrobustError."""
    config = config_of(row, seed, scale, device, data)
    sweep.train_point(config)
    directory = Path(config.output) / config.name
    one = read_run(directory)
    file = file_of(row, seed, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "row": row.name,
        "date": time.strftime("%Y-%m-%d", time.gmtime((directory / run.SUMMARY).stat().st_mtime)),
        "config": one.config.to_dict(),
        "summary": one.summary.model_dump(),
        "history": [record.model_dump(exclude_none=True) for record in one.history],
    }
    run.write_json(file, found)


def read_result(file: Path) -> Result:
    try:
        found = json.loads(file.read_text())
        return Result(found["row"], found["config"], found["summary"], found["history"])
    except (ValueError, KeyError, TypeError):
        raise FastrobustError(f"{file} is damaged: delete it, and the run is read or trained again") from None


def results_of(row: paper.Row, folder: Path) -> list[Result]:
    return [read_result(file) for file in sorted(folder.glob(f"{row.name}_seed*.json"))]


class OutOfTime(FastrobustError):
    pass


class Deadline:
    """After `minutes` the run at work is stopped as by SIGTERM: it writes a checkpoint and can go on."""

    def __init__(self, minutes: float | None):
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.timer = None

    def __enter__(self) -> Deadline:
        self.before = signal.signal(signal.SIGTERM, self._stop)
        if self.end is not None:
            self.timer = threading.Timer(max(0.0, self.end - time.monotonic()), os.kill, (os.getpid(), signal.SIGTERM))
            self.timer.daemon = True
            self.timer.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.timer:
            self.timer.cancel()
        signal.signal(signal.SIGTERM, self.before)

    def _stop(self, signum, frame) -> None:
        raise OutOfTime("stopped while evaluating")

    @property
    def over(self) -> bool:
        return self.end is not None and time.monotonic() >= self.end


def train_all(rows: list[paper.Row], folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Train what has no result yet: every row's first seed, then every row's second. Returns what stayed open, and why."""
    seeds, minutes = range(arguments.seeds), arguments.minutes
    todo = [(row, s) for s in seeds for row in rows if row.config and not file_of(row, s, folder).exists()]
    open_rows: list[str] = []
    with Deadline(minutes) as deadline:
        for i, (row, seed) in enumerate(todo):
            if deadline.over:
                return open_rows + [f"{r.name} seed {s}: no time left" for r, s in todo[i:]]
            print(f"[{i + 1}/{len(todo)}] {row.name}, seed {seed}", flush=True)
            try:
                train(row, seed, folder, arguments.scale, arguments.device, arguments.data)
            except (Interrupted, OutOfTime) as error:
                if not deadline.over:
                    raise
                open_rows.append(f"{row.name} seed {seed}: {str(error).splitlines()[0]}")
            except FastrobustError as error:
                open_rows.append(f"{row.name} seed {seed}: {str(error).splitlines()[0]}")
                if isinstance(error, DataError):
                    print(f"skipped: {error}", file=sys.stderr, flush=True)
    return open_rows


# tables: each is (title, headings, rows of cells)


def cell(values: list[float | None], digits: int = 2) -> str:
    """The mean in per cent, and the range where there are several."""
    values = [100 * v for v in values if v is not None]
    if not values:
        return "not measured"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def told(values: dict, *keys: str) -> list[str]:
    """The paper's figures for these keys, as they are printed there."""
    found = [values.get(key, "") for key in keys]
    return [f"{value:.2f}" if isinstance(value, float) else str(value) for value in found]


def facts(results: list[Result]) -> list[str]:
    """n, seeds, attack, training time, hardware."""
    if not results:
        return ["", "", "", "", ""]
    s = [r.summary for r in results]
    first = s[0]["evaluations"][0]
    devices = sorted({f"{x['hardware']['device']}, {x['hardware']['threads']} threads" for x in s})
    stopped = sum(x["stopped"] is not None for x in s)
    seconds = duration(statistics.fmean(x["train_seconds"] for x in s)) + (
        f", {stopped} stopped by the guard" if stopped else ""
    )
    return [f"{first['examples']:,}", str(len(s)), first["attack"].replace("-", "\u2011"), seconds, "; ".join(devices)]


FACTS = ["n", "seeds", "attack", "training", "hardware"]


def accuracy_table(
    title: str, rows: list[paper.Row], folder: Path, radii: list[float | None]
) -> tuple[str, list[str], list[list[str]]]:
    """Clean and robust accuracy, ours beside the paper's. A radius of None is the first that was evaluated."""
    keys = ["clean", *(f"robust{i or ''}" for i in range(len(radii)))]
    names = ["clean", *("PGD" if e is None else f"PGD {describe(e)}" for e in radii)]
    theirs = [
        "clean",
        *("PGD" if e is None else f"PGD {describe(p)}" for e, p in zip(radii, paper.RADII["full"], strict=False)),
    ]
    cells = []
    for row in rows:
        results = results_of(row, folder)
        ours = [cell([r.summary["clean_accuracy"] for r in results]), *(cell([r.robust(e) for r in results]) for e in radii)]
        mixed = [part for pair in zip(told(row.paper, *keys), ours, strict=True) for part in pair]
        cells.append([row.label, *mixed, *facts(results)])
    heads = [part for a, b in zip(theirs, names, strict=True) for part in (f"paper: {a}", f"ours: {b}")]
    return title, ["", *heads, *FACTS], cells


def table3(rows: list[paper.Row], folder: Path, scale: str) -> tuple[str, list[str], list[list[str]]]:
    goal = paper.GOAL[scale]
    cells = []
    for row in rows:
        results = results_of(row, folder)
        per_epoch = [r.summary["train_seconds"] / r.summary["epochs"] for r in results]
        minutes = [r.summary["train_seconds"] / 60 for r in results]
        ours = [f"{statistics.fmean(per_epoch):.2f}", f"{statistics.fmean(minutes):.2f}"] if results else ["", ""]
        reached = sum(r.robust() >= goal for r in results)
        times = [*told(row.paper, "seconds_per_epoch"), ours[0], *told(row.paper, "minutes"), ours[1]]
        accuracy = [cell([r.robust() for r in results]), f"{reached} of {len(results)}"]
        n, seeds, *_, hardware = facts(results)
        cells.append([row.label, *told(row.paper, "epochs"), epochs_of(row), *times, *accuracy, n, seeds, hardware])
    head = ["", "paper: epochs", "ours: epochs", "paper: s/epoch", "ours: s/epoch", "paper: minutes", "ours: minutes"]
    return (
        f"Time to {goal:.0%} robust accuracy",
        [*head, "ours: PGD", f"reached {goal:.0%}", "n", "seeds", "hardware"],
        cells,
    )


def epochs_of(row: paper.Row) -> str:
    return "" if row.config is None else str(config_module.load(ROOT / "configs" / row.config, list(row.overrides)).epochs)


def figure1() -> str:
    """The schedules are functions: nothing is trained."""
    drawn = []
    for title, (schedule, epochs) in paper.SCHEDULES.items():
        rate = schedules.from_config(schedule, epochs)
        points = [(epochs * i / 600, rate(epochs * i / 600)) for i in range(601)]
        drawn.append(chart(f"{title}: learning rate", [Line(title, points, dots=False)], x="epoch"))
    return "".join(drawn)


def figure2(folder: Path, scale: str) -> tuple[str, tuple[str, list[str], list[list[str]]]]:
    """(two charts, the table behind them)"""
    goal, rows = paper.GOAL[scale], paper.ROWS[scale]["figure2"]
    groups: dict[str, list[tuple[int, list[Result]]]] = {}
    for row in rows:
        groups.setdefault(row.label, []).append((int(epochs_of(row)), results_of(row, folder)))
    cells, lines = [], {"Robust accuracy": [], "Clean accuracy": []}
    for colour, (label, found) in enumerate(groups.items()):
        done = sorted((epochs, results) for epochs, results in found if results)
        for title, get in (("Robust accuracy", Result.robust), ("Clean accuracy", lambda r: r.summary["clean_accuracy"])):
            values = [(epochs, [get(r) for r in results]) for epochs, results in done]
            band = [(epochs, min(v), max(v)) for epochs, v in values if len(v) > 1]
            lines[title].append(Line(label, [(epochs, statistics.fmean(v)) for epochs, v in values], colour, band))
        first = next((e for e, results in done if statistics.fmean(r.robust() for r in results) >= goal), None)
        tried = ", ".join(f"{e}: {cell([r.robust() for r in results], 1)}" for e, results in done)
        seeds = str(max((len(results) for _, results in done), default=0))
        cells.append([label, str(paper.FIRST_TO_45[label]), str(first or "not reached"), tried or "not measured", seeds])
    drawn = "".join(chart(title, of, x="epochs", percent=True, y_range=(0.0, 1.0)) for title, of in lines.items())
    head = ["", "paper: epochs to 45%", f"ours: epochs to {goal:.0%}", "epochs tried: robust accuracy", "seeds"]
    return drawn, (TITLES[scale]["figure2"], head, cells)


def table5(rows: list[paper.Row], folder: Path) -> tuple[str, list[str], list[list[str]]]:
    """Minutes an epoch of each phase, from the runs of Table 4."""
    cells = []
    for row in rows:
        results = results_of(row, folder)
        for phase, (epochs, minutes) in enumerate(row.paper["phases"]):
            seconds = [r["seconds"] for one in results for r in one.history if r.get("phase") == phase]
            ours = f"{statistics.fmean(seconds) / 60:.2f}" if seconds else "not measured"
            cells.append([f"{row.label}, phase {phase + 1}", str(epochs), f"{minutes:.2f}", ours, *facts(results)[1::3]])
    return "ImageNet: minutes an epoch (paper: four 2080 Ti)", ["", "epochs", "paper", "ours", "seeds", "hardware"], cells


TITLES = {
    "full": {
        "table1": "Table 1: CIFAR-10 at epsilon 8/255",
        "table2": "Table 2: MNIST, trained at epsilon 0.3",
        "table3": "Table 3: time to 45% robust accuracy on CIFAR-10 (paper: one 2080 Ti)",
        "table4": "Table 4: ImageNet",
        "figure2": "Figure 2: CIFAR-10, accuracy against the number of epochs",
    },
    "small": {
        "table1": "Table 1 in miniature: Fashion-MNIST at epsilon 0.25 (paper: CIFAR-10)",
        "table2": "Table 2 in miniature: Fashion-MNIST, trained at epsilon 0.25 (paper: MNIST)",
        "table3": "Table 3 in miniature: time to 50% robust accuracy (paper: 45% on CIFAR-10)",
        "figure2": "Figure 2 in miniature: accuracy against the number of epochs (paper: CIFAR-10)",
    },
}


def build(names: list[str], folder: Path, scale: str) -> list[tuple[str, str, tuple | None]]:
    """(name, charts as HTML, table or None) of everything asked for, out of the result files."""
    found = []
    for name in names:
        rows = paper.ROWS[scale].get(name, [])
        if name == "figure1":
            found.append((name, figure1(), None))
        elif name == "figure2":
            found.append((name, *figure2(folder, scale)))
        elif name == "table3":
            found.append((name, "", table3(rows, folder, scale)))
        elif name == "table5":
            found.append((name, "", table5(rows, folder)))
        else:
            radii = paper.RADII[scale] if name == "table2" else [None]
            found.append((name, "", accuracy_table(TITLES[scale][name], rows, folder, radii)))
    return found


def write_page(file: Path, found: list, scale: str, open_rows: list[str]) -> None:
    title = "The paper's tables and figures" + (" in miniature" if scale == "small" else "")
    parts = [f"<h1>{title}</h1>"]
    if scale == "small":
        parts.append(f'<p class="warn">{escape(paper.MINIATURE)}</p>')
    for _, drawn, content in found:
        parts.append(f"<h2>{escape(content[0]) if content else 'Figure 1: learning-rate schedules'}</h2>")
        parts.append(f'<div class="grid">{drawn}</div>' if drawn else "")
        if content:
            parts.append(table([[escape(c) for c in row] for row in content[2]], list(map(escape, content[1]))))
    parts += [f'<p class="note">open: {escape(line)}</p>' for line in open_rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    run.write_text(file, page(title, "\n".join(parts)))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", nargs="*", help=f"{', '.join(paper.ROWS['full'])} (default: all that the scale has)")
    p.add_argument("--scale", choices=["full", "small"], default="full")
    p.add_argument("--minutes", type=float, help="stop after so long; the run at work can go on later")
    p.add_argument("--seeds", type=count, default=1)
    p.add_argument("--device", default="auto")
    p.add_argument("--data", help="where the data set lies (default: the usual places)")
    p.add_argument(
        "--results", metavar="FOLDER", default=str(RUNS / "results"), help="of the result files (default: %(default)s)"
    )
    p.add_argument("--show", action="store_true", help="train nothing: print what the result files hold")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return main_with_errors(lambda: start(arguments))


def start(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    scale, folder = arguments.scale, Path(arguments.results) / arguments.scale
    known = paper.ROWS[scale]
    names = arguments.what or list(known)
    for name in names:
        if name not in known:
            raise ConfigError(f"--scale {scale} has no '{name}'; it has {', '.join(known)}")
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise ConfigError(f"--minutes {arguments.minutes:g}: give a positive number")
    rows = sorted({row.name: row for name in reversed(names) for row in known[name]}.values(), key=lambda row: row.order)
    open_rows = []
    if not arguments.show:
        open_rows = train_all(rows, folder, arguments)
    found = build(names, folder, scale)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    if scale == "small":
        console.print(paper.MINIATURE, soft_wrap=True)
    for _, _, content in found:
        if content:
            shown = Table(*content[1], title=content[0], title_justify="left")
            for row in content[2]:
                shown.add_row(*row)
            console.print(shown)
    file = folder.parent / f"{scale}.html"
    write_page(file, found, scale, open_rows)
    print(f"{file}: the same, with the figures")
    for line in open_rows:
        print(f"open: {line}")
    return 1 if open_rows else 0


if __name__ == "__main__":
    sys.exit(main())
