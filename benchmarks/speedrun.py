"""The record: 45 % under PGD-50-10 at 8/255 on CIFAR-10, for the fewest floating-point operations of training.

    python -m benchmarks.speedrun               # configs/cifar10_speedrun.yaml, three seeds, from nothing to the number
    python -m benchmarks.speedrun --show --results benchmarks/results/speedrun      # what is measured so far

The operations are counted by the program: every pass of attack and update (`train_pflop` of a summary). What held-out images
and evaluation cost is not among them. Every seed is trained, attacked on all test images and written to a file of its own. A
call that was interrupted, or ran out of its minutes, goes on when it is repeated. A row of the table is a setting: the files
of an earlier record stay in the table when they are in the folder under other names."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

from benchmarks import jobs, paper, reproduce
from benchmarks.method_setting import digest, digests
from benchmarks.tables import MISSING, Result, attack_of, cell, file_of, read_result
from fastrobust.__main__ import count
from fastrobust.config import reading
from fastrobust.runtime.command import main_with_errors
from fastrobust.runtime.errors import RunError
from fastrobust.runtime.progress import duration

GOAL = 0.45
ROW = paper.Row("cifar10_speedrun", "the record", "cifar10_speedrun.yaml")
RUNS = paper.RUNS / "speedrun"
HEAD = ["date", "PFLOP", "PGD %", "95 % interval", "clean %", f"{GOAL:.0%}", "seeds", "training", "setting"]


def run(seed: int, folder: Path, device: str, data: str | None) -> None:
    """Train, attack, and write the result. Raises FastrobustError."""
    file = file_of(ROW, seed, folder)
    if file.exists():
        raise RunError(f"{file} is of another setting: rename it, and the seed is trained with today's")
    reproduce.train(ROW, seed, folder, RUNS.name, device, data)


def read_all(folder: Path) -> dict[str, list[tuple[str, Result]]]:
    """The results in the folder, (date, result), by the digest of their setting, seeds in order. Raises FastrobustError."""
    found: dict[str, list[tuple[str, Result]]] = {}
    for file in sorted(folder.rglob("*.json")):
        one, date = read_result(file), json.loads(file.read_text())["date"]
        found.setdefault(digest(reading.parse(one.config, str(file))), []).append((date, one))
    return {key: sorted(runs, key=lambda run: run[1].config["seed"]) for key, runs in found.items()}


def rows(found: dict[str, list[tuple[str, Result]]]) -> list[list[str]]:
    """The rows of the table, the oldest first. Accuracies are means over the seeds, each seed's in brackets; the interval is
    that of a mean of accuracies on the same images: as wide as one seed's."""
    made = []
    for key, runs in sorted(found.items(), key=lambda item: min(date for date, _ in item[1])):
        results = [one for _, one in runs]
        pflop = [one.summary.get("train_pflop") for one in results]
        robust = [one.robust() for one in results]
        ends = [statistics.fmean(one.evaluation()["robust_interval"][k] for one in results) for k in (0, 1)]
        each = ", ".join(f"{100 * value:.2f}" for value in robust)
        mean = statistics.fmean(robust)
        times = "; ".join(
            sorted({f"{duration(one.seconds)} on {one.hardware}, {one.config['precision']}" for one in results})
        )
        made.append(
            [
                min(date for date, _ in runs),
                MISSING if None in pflop else f"{statistics.fmean(pflop):.3f}",
                f"{100 * mean:.2f}" + (f" ({each})" if len(robust) > 1 else ""),
                f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}",
                cell([one.clean for one in results]),
                "reached" if mean >= GOAL else "missed",
                ", ".join(str(one.config["seed"]) for one in results),
                times,
                key[:8],
            ]
        )
    return made


def as_markdown(found: dict[str, list[tuple[str, Result]]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEAD, ["---"] * len(HEAD), *rows(found))]
    results = [one for runs in found.values() for _, one in runs]
    data = "; ".join(sorted({one.data for one in results}))
    told = f"{attack_of(results)}; {data}." if results else "No run yet."
    return "\n".join([*lines, "", told])


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.speedrun", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--seeds", type=count, default=3)
    jobs.add_options(p)
    p.add_argument(
        "--results", metavar="FOLDER", default=str(RUNS / "results"), help="of the result files (default: %(default)s)"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return main_with_errors(lambda: start(arguments))


def start(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.results)
    jobs.check(arguments.minutes)
    left_open: list[str] = []
    if not arguments.show:
        settings = (folder, arguments.device, arguments.data)
        today, found = digests(reproduce.config_of(ROW, 0, RUNS.name, *settings[1:])), read_all(folder)
        there = {one.config["seed"] for key in today for _, one in found.get(key, [])}
        todo = [seed for seed in range(arguments.seeds) if seed not in there]
        left_open = jobs.work([(f"seed {seed}", partial(run, seed, *settings)) for seed in todo], arguments.minutes)
    print(as_markdown(read_all(folder)))
    for line in left_open:
        print(f"open: {line}")
    return 1 if left_open else 0


if __name__ == "__main__":
    sys.exit(main())
