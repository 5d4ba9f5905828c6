"""How long before a collapse the gradients of the attack cease to agree.

`python -m benchmarks.alignment CONFIG [key=value ...] --json FILE` trains a config to its end, whatever happens, and
notes the alignment of the attack's gradients (`fastrobust.train.alignment`), the accuracy under the training attack, and
every few updates the accuracy under the guard's PGD on the guard's 512 images. `--show FILE ...` makes the table of such
files.

A run has collapsed where its PGD accuracy is below half of its highest for good. An alarm is the first update at which the
mean of the last 64 updates is below a threshold, after it was above three times the guard's; training's first 64 do not
count."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fastrobust.attack.pgd import pgd
from fastrobust.config import reading
from fastrobust.data import loaders
from fastrobust.data.augment import center_crop
from fastrobust.data.held_out import evenly_spaced
from fastrobust.runtime.files import write_json
from fastrobust.runtime.machine import environment
from fastrobust.runtime.progress import Progress
from fastrobust.train import guard, schedules, step
from fastrobust.train.alignment import EVERY, WINDOW

THRESHOLDS = (0.2, guard.LOW, 0.05)


def record(config, every: int) -> dict:
    """Of a run on a CPU, of one phase."""
    device = torch.device("cpu")
    config = loaders.resolve(config, device)
    loader = loaders.Phases(config, device).enter(0)
    training = step.build(config, loader, device)
    learner, phase = training.learner, config.phases[0]
    images, labels, _ = loader.still(evenly_spaced(len(loader), guard.IMAGES))
    images = center_crop(images, phase.resolution)
    steps, robust, trained = schedules.steps_in(config, phase, len(loader)), [], []
    with Progress("train", steps) as bar:
        for i, batch in enumerate(loader.batches(config.seed, 0, phase.batch_size, 0, steps), 1):
            training(batch)
            bar.advance(1, "" if bar.due() else None)
            if i % every == 0:
                scale = training.scale_now()
                settings = {"alpha": config.guard.alpha * scale, "steps": config.guard.steps, "restarts": 1, "seed": 0}
                found = pgd(learner.model, images, labels, threat=training.threat.scaled(scale), **settings)
                _, correct, seen = learner.read_sums()
                learner.reset_sums()
                robust.append(round(found.robust.double().mean().item(), 3))
                trained.append(round(correct / seen, 3))
    alignments = [round(a, 3) for a in learner.alignments[:steps:EVERY].tolist()]
    series = {"robust": robust, "trained": trained, "alignments": alignments}
    return {"epoch_steps": steps / phase.epochs, "every": every, "alignments_every": EVERY} | series


def collapse(run: dict) -> int | None:
    """The update at which PGD accuracy is below half of its highest, and stays there."""
    half, found = max(run["robust"]) / 2, None
    for i, accuracy in enumerate(run["robust"], 1):
        if accuracy >= half:
            found = None
        elif found is None:
            found = i * run["every"]
    return found if max(run["robust"][: (found or 1) // run["every"]], default=0) >= half else None


def alarm(run: dict, threshold: float) -> int | None:
    """The update at which alignment gives the alarm."""
    width, highest = WINDOW // run["alignments_every"], 0.0
    noted = run["alignments"]
    for i in range(2 * width, len(noted) + 1):
        mean = sum(noted[i - width : i]) / width
        highest = max(highest, mean)
        if mean < threshold and highest > 3 * guard.LOW:
            return (i - 1) * run["alignments_every"] + 1
    return None


def row(name: str, run: dict) -> list[str]:
    fell, best = collapse(run), max(run["robust"])
    cells = [name, f"{best:.1%}", f"{run['robust'][-1]:.1%}", str(fell or "never")]
    for threshold in THRESHOLDS:
        at = alarm(run, threshold)
        cells.append("none" if at is None else f"{at}" + (f" ({fell - at:+d})" if fell else ""))
    return cells


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.alignment", description=__doc__.splitlines()[0])
    p.add_argument("config", nargs="?", help="a config file")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.add_argument("--every", type=int, default=40, help="updates between two attacks on the guard's images")
    p.add_argument("--json", type=Path, help="the file to write")
    p.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="files to make a table of")
    arguments = p.parse_args()
    runs = {file.stem: json.loads(file.read_text()) for file in arguments.show or ()}
    if arguments.config:
        config = reading.load(arguments.config, arguments.overrides)
        command = " ".join([arguments.config, *arguments.overrides, "--every", str(arguments.every)])
        runs[config.name] = {"command": command} | record(config, arguments.every) | environment("cpu")
        if arguments.json:
            write_json(arguments.json, runs[config.name])
    heads = (
        "run",
        "PGD, highest",
        "at the end",
        "collapsed at update",
        *(f"alarm below {t:g} (before)" for t in THRESHOLDS),
    )
    table = Table(*heads)
    for name, run in runs.items():
        table.add_row(*row(name, run))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
