"""Threads of a small network on a CPU, beside other work: python -m benchmarks.threads [--json FILE]

Images/s of FGSM steps on the MNIST network, batch 100, with every fixed number of threads and with the number that a run
chooses (`fastrobust.train.threads`), while 0, 1, ... other processes occupy a core each. The settings run in turn, each in a
process of its own, several times; the table has the medians."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastrobust.runtime.limits import cores

BUSY = "while True: pass"


def images_per_second(seconds: float) -> float:
    """In this process, with the threads that there are and trials unless the user has fixed the number."""
    import torch

    from fastrobust.attack.threat import Threat
    from fastrobust.data.batch import Batch
    from fastrobust.models import create
    from fastrobust.runtime.distributed import ALONE
    from fastrobust.train.learner import Learner
    from fastrobust.train.methods.fgsm import Fgsm
    from fastrobust.train.optimizers import Adam
    from fastrobust.train.step import Step
    from fastrobust.train.threads import Threads

    torch.manual_seed(0)
    model = create("mnist_net", channels=1, classes=10, mean=(0.0,), std=(1.0,)).to(memory_format=torch.channels_last)
    learner = Learner(model.train(), Adam(name="adam"), torch.full((1,), 1e-3))
    step = Step(learner, Fgsm(name="fgsm", alpha=0.375), Threat(0.3), classes=10, examples=100)
    step.enter_phase(100, 1, 28)
    batch = Batch(torch.randint(0, 256, (100, 1, 28, 28)).to(torch.uint8), torch.arange(100) % 10, torch.arange(100))
    threads, count = Threads(step, ALONE, False), 0
    for _ in range(10):
        step(batch)
    threads.look(batch)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        threads.look(batch)
        step(batch)
        count += 1
    return 100 * count / (time.perf_counter() - began)


def measure(setting: str, seconds: float) -> float:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if setting != "chosen":
        environment["OMP_NUM_THREADS"] = setting
    command = [sys.executable, "-m", "benchmarks.threads", "--child", str(seconds)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.threads", description=__doc__.splitlines()[0])
    p.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default 5)")
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--child", type=float, help=argparse.SUPPRESS)
    p.add_argument("--json", type=Path)
    arguments = p.parse_args()
    if arguments.child:
        print(images_per_second(arguments.child))
        return
    settings = ["chosen", *map(str, sorted({1, cores()}))]
    rows = {}
    for busy in range(cores() + 1):
        others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
        try:
            found: dict[str, list[float]] = {setting: [] for setting in settings}
            for _ in range(arguments.repeat):
                for setting in settings:
                    found[setting].append(measure(setting, arguments.seconds))
        finally:
            for other in others:
                other.kill()
                other.wait()
        rows[busy] = {setting: statistics.median(values) for setting, values in found.items()}
        print(f"{busy} busy processes: {rows[busy]}", file=sys.stderr, flush=True)
    table = Table("other busy processes", *(f"{s} threads" if s.isdecimal() else s for s in settings), "chosen / best fixed")
    for busy, row in rows.items():
        share = row["chosen"] / max(value for setting, value in row.items() if setting != "chosen")
        table.add_row(str(busy), *(f"{row[s]:,.0f}" for s in settings), f"{share:.2f}")
    Console(width=120).print(table)
    if arguments.json:
        from fastrobust.runtime.machine import environment

        arguments.json.write_text(json.dumps({"rows": rows, **environment("cpu")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
