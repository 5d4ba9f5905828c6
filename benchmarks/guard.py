"""How often the guard against catastrophic overfitting errs: python -m benchmarks.guard [--json FILE]

False alarms: healthy runs of 15 epochs, whose robust accuracy is p after every epoch but for a wobble of so many points
(standard deviation) and for chance. Misses: runs whose robust accuracy falls from p to q in one epoch. Two rules are
simulated: the paper's code (another minibatch of B images after every epoch, a fall of more than 20 points) and the guard's
(`fastrobust.train.guard`: the same images after every epoch, the same fall, which must also be significant). Of the guard's
images a share `churn` changes its verdict from one epoch to the next without any change of the accuracy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fastrobust.train import guard

RUNS, EPOCHS, DROP = 2000, 15, 0.2


def minibatches(rng: np.random.Generator, accuracies: np.ndarray, batch: int) -> bool:
    """Whether the paper's rule stops a run with these true accuracies."""
    found = rng.binomial(batch, accuracies) / batch
    return bool((found[:-1] - found[1:] > DROP).any())


def same_images(rng: np.random.Generator, accuracies: np.ndarray, images: int, churn: float) -> bool:
    """Whether the guard's rule stops a run with these true accuracies."""
    robust = rng.random(images) < accuracies[0]
    for p in accuracies[1:]:
        before, share = robust, robust.mean()
        lose = min(1.0, max(0.0, churn / 2 + max(0.0, share - p)) / max(share, 1e-9))
        win = min(1.0, max(0.0, churn / 2 + max(0.0, p - share)) / max(1 - share, 1e-9))
        draws = rng.random(images)
        robust = np.where(before, draws >= lose, draws < win)
        if guard.fell(torch.from_numpy(before), torch.from_numpy(robust), DROP):
            return True
    return False


def share(rule, accuracies, runs: int) -> float:
    return float(np.mean([rule(accuracies()) for _ in range(runs)]))


def simulate(runs: int = RUNS, seed: int = 0) -> list[dict]:
    """One row for each rule: the share of healthy runs that it stops, and the share of collapses that it misses."""
    rng = np.random.default_rng(seed)
    rules = {f"paper's, {b} images": (lambda p, b=b: minibatches(rng, p, b)) for b in (16, 32, 64, 128, 512)}
    for images in (guard.ENOUGH, guard.IMAGES):
        for churn in (0.1, 0.3):
            rules[f"guard, {images} images, churn {churn:.0%}"] = lambda p, n=images, c=churn: same_images(rng, p, n, c)
    rows = []
    for name, rule in rules.items():
        row: dict = {"rule": name}
        for wobble in (0.0, 0.03, 0.06):
            healthy = lambda w=wobble: (0.45 + rng.normal(0, w, EPOCHS)).clip(0, 1)
            row[f"stopped_healthy_{wobble:g}"] = share(rule, healthy, runs)
        for fall in (0.25, 0.3, 0.4):
            row[f"missed_fall_{fall:g}"] = 1 - share(rule, lambda f=fall: np.array([0.45, 0.45 - f]), runs)
        rows.append(row)
    return rows


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.guard", description=__doc__.splitlines()[0])
    p.add_argument("--runs", type=int, default=RUNS)
    p.add_argument("--json", type=Path)
    arguments = p.parse_args()
    rows = simulate(arguments.runs)
    table = Table(*(key.replace("_", " ") for key in rows[0]), title=f"{arguments.runs} simulated runs a cell, p = 45 %")
    for row in rows:
        table.add_row(*(f"{v:.1%}" if isinstance(v, float) else v for v in row.values()))
    Console(width=150).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"runs": arguments.runs, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
