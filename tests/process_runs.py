"""A small run for several processes, and what two of them are compared by."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fastrobust.__main__ import main as cli
from fastrobust.config import reading
from fastrobust.config.schema import Config
from fastrobust.data import loaders
from fastrobust.models.weights import read_weights
from fastrobust.runtime import run_directory
from tests.stress import child

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SGD = {"optimizer": {"name": "sgd"}, "schedule": {"name": "cyclic", "max_lr": 0.02}}
ZERO = {"name": "fgsm", "init": "zero"}


def main(*argv: str) -> int:
    return cli(["train", *argv])


def small_run(config_file, few_bars, folder: Path, **changes) -> Path:
    """A config file of a run of seconds, 4, 3 and 3 steps; it goes to folder/runs/bars."""
    phases = [{"epochs": 3, "batch_size": 20, "resolution": 28}]
    small = {"data__path": str(few_bars), "data__limit": 65, "phases": phases, **SGD}
    return config_file(folder, **(small | {"evaluation": {"steps": 3, "restarts": 2, "limit": 20}} | changes))


def ended_well(processes: list[child.Ended]) -> bool:
    assert [p.status for p in processes] == [0] * len(processes), "\n".join(p.output for p in processes)
    return True


def resolved(file: str | Path, *changes: str) -> Config:
    return loaders.resolve(reading.load(file, changes), CPU)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return read_weights(directory)[0].state_dict()


def same_bits(a: Path, b: Path) -> bool:
    """Weights and every figure but the times."""
    one, other = weights(a), weights(b)
    lines = [[json.loads(line) for line in (d / run_directory.METRICS).read_text().splitlines()] for d in (a, b)]
    plain = [[{k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in part] for part in lines]
    return plain[0] == plain[1] and all(torch.equal(one[name], other[name]) for name in one)
