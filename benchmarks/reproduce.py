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
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks import jobs, paper
from benchmarks.paper import ROOT
from benchmarks.tables import build, file_of, read_result, write_page
from fastrobust.__main__ import count
from fastrobust.config import reading
from fastrobust.data import sets
from fastrobust.reporting.stored import read_run
from fastrobust.runtime import distributed, machine, run_directory
from fastrobust.runtime.command import main_with_errors
from fastrobust.runtime.errors import ConfigError
from fastrobust.runtime.files import explained, write_json
from fastrobust.train import start as training

VERIFIED = "epsilon-0.1"  # of a run's `verification/`: the radius of Table 2


def config_of(row: paper.Row, seed: int, scale: str, device: str, data: str | None):
    overrides = [*row.overrides, f"seed={seed}", f"name={row.name}_seed{seed}", f"output={paper.RUNS / scale}"]
    overrides += [f"device={device}"] + ([f"data.path={json.dumps(data)}"] if data else [])
    return reading.load(ROOT / "configs" / row.config, overrides)


def train(row: paper.Row, seed: int, folder: Path, scale: str, device: str, data: str | None) -> None:
    """Train, evaluate, and write the result. Raises FastrobustError."""
    config = config_of(row, seed, scale, device, data)
    directory = Path(config.output) / config.name
    only_read = (directory / run_directory.SUMMARY).exists()
    training.run(config, directory, distributed.pick_device(config.device), distributed.ALONE, again=True)
    one = read_run(directory)
    summary = one.summary.model_dump()
    if not only_read:
        summary["hardware"] = both(summary["hardware"], machine.environment(config.device)["hardware"])
    found = {
        "row": row.name,
        "date": time.strftime("%Y-%m-%d", time.gmtime((directory / run_directory.SUMMARY).stat().st_mtime)),
        "data": source_of(one.config),
        "config": one.config.to_dict(),
        "summary": summary,
        "history": [record.model_dump(exclude_none=True) for record in one.history],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file_of(row, seed, folder), found)


def both(begun: dict, ended: dict) -> dict:
    """The hardware of a run that may have been begun on another machine: its seconds are then of neither."""
    if begun["device"] == ended["device"]:
        return begun
    return begun | {"device": f"{begun['device']}, then {ended['device']}", "cpu": None}


def source_of(config) -> str:
    """The data set and the name of the folder or file that was read: CIFAR-10 as JPEG is not CIFAR-10."""
    place = config.data.prepared or sets.locate(config.data.dataset, config.data.path)
    return f"{config.data.dataset} ({Path(place).resolve().name})"


def add_verdicts(rows: list[paper.Row], folder: Path, scale: str) -> None:
    """Put what `fastrobust verify` found about a run at work into its result. Its timeouts may have been retried since."""
    for row in rows:
        for file in sorted(folder.glob(f"{row.name}_seed*.json")):
            verdicts = paper.RUNS / scale / file.stem / "verification" / VERIFIED / "summary.json"
            if verdicts.exists():
                read_result(file)  # says what is damaged
                with explained(f"{verdicts} cannot be read"):
                    write_json(file, json.loads(file.read_text()) | {"verified": json.loads(verdicts.read_text())})


def train_all(rows: list[paper.Row], folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Train what has no result yet: every row's first seed, then every row's second. Returns what stayed open, and why."""
    settings = (folder, arguments.scale, arguments.device, arguments.data)
    todo = [
        (f"{row.name}, seed {seed}", partial(train, row, seed, *settings))
        for seed in range(arguments.seeds)
        for row in rows
        if row.config and not file_of(row, seed, folder).exists()
    ]
    return jobs.work(todo, arguments.minutes)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", nargs="*", help=f"{', '.join(paper.ROWS['full'])} (default: all that the scale has)")
    p.add_argument("--only", metavar="ROW", nargs="+", help="train these rows alone, by the names of their result files")
    p.add_argument("--scale", choices=["full", "small"], default="full")
    p.add_argument("--seeds", type=count, default=1)
    jobs.add_options(p)
    p.add_argument(
        "--results", metavar="FOLDER", default=str(paper.RUNS / "results"), help="of the result files (default: %(default)s)"
    )
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
    jobs.check(arguments.minutes)
    rows = sorted({row.name: row for name in reversed(names) for row in known[name]}.values(), key=lambda row: row.order)
    if unknown := set(arguments.only or ()) - {row.name for row in rows}:
        raise ConfigError(f"--only: {', '.join(names)} have no row {min(unknown)}: {', '.join(row.name for row in rows)}")
    if arguments.only:
        rows = [row for row in rows if row.name in arguments.only]
    open_rows = []
    if not arguments.show:
        open_rows = train_all(rows, folder, arguments)
        add_verdicts(rows, folder, scale)
    found = build(names, folder, scale)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 250)
    if scale == "small":
        console.print(paper.MINIATURE, soft_wrap=True)
    for _, _, content in found:
        if content:
            shown = Table(*content.head, title=content.title, title_justify="left")
            for row in content.rows:
                shown.add_row(*row)
            console.print(shown)
            for note in content.notes:
                console.print(note, soft_wrap=True, markup=False)
    file = folder.parent / f"{scale}.html"
    write_page(file, found, scale, open_rows)
    print(f"{file}: the same, with the figures")
    for line in open_rows:
        print(f"open: {line}")
    return 1 if open_rows else 0


if __name__ == "__main__":
    sys.exit(main())
