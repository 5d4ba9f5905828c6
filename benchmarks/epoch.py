"""Seconds per epoch of CIFAR-10's size, loader included, for each method of Table 3, and where they go.

    python -m benchmarks.epoch --quick         # two CPU cores: 1,024 images, scaled to 50,000
    python -m benchmarks.epoch --json benchmarks/results/epoch.json

`data` is the loader with crop and flip; `update` what standard training adds to that; `attack` what the method adds to
standard training. The usual loop reads its images through a DataLoader with two workers.
"""

from __future__ import annotations

import statistics

import torch

from benchmarks import measure, usual_loop
from benchmarks.step import METHODS, cifar_config, images, network
from fastrobust.data.augment import augment
from fastrobust.data.loaders.resident import Resident
from fastrobust.runtime import distributed
from fastrobust.train import engine
from fastrobust.train.step import build

FULL = 50_000
PAPER = {"fgsm": 23.41, "pgd-7": 91.59, "free-8": 13.46}  # Table 3: one 2080 Ti, mixed precision; free per replay


def main() -> None:
    p = measure.arguments(__doc__.splitlines()[0])
    p.add_argument("--images", type=int, help="default: 50000, with --quick on a CPU 1024")
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--engine", help="default: auto")
    p.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: fp16 on a GPU, fp32 on a CPU")
    arguments = p.parse_args()
    device, batch_size = distributed.pick_device(arguments.device), arguments.batch_size
    cuda = device.type == "cuda"
    torch.backends.cudnn.benchmark = True
    count = arguments.images or (1024 if arguments.quick and not cuda else FULL)
    precision = arguments.precision or ("fp16" if cuda else "fp32")
    data = images(count)
    loader = Resident(data, device)
    names = ["standard", "fgsm"] if arguments.quick and not cuda else list(METHODS)
    batches = -(-count // batch_size)
    rows = {}

    def one_pass(step) -> None:
        for batch in loader.batches(0, 0, batch_size, 0, batches):
            step(batch)

    for name in names:
        config = cifar_config(name, arguments.engine or "auto", precision, batch_size)
        step = build(config, loader, device)
        rows[name] = lambda step=step: one_pass(step)
    kernels = step.threat.kernels  # run as the steps are, whose part it is
    crop = lambda batch: augment(batch.images, config.data.augment, 32, kernels)
    prepared = engine.prepare(step.engine, crop, next(loader.batches(0, 0, batch_size, 0, 1)), step)
    rows["data"] = lambda: one_pass(prepared)
    usual = usual_loop.UsualLoop(network(), device, half=cuda)
    workers = usual_loop.loader(data.images, data.labels, batch_size, 2, cuda)

    def usual_pass() -> None:
        for x, y in workers:
            usual.step(x, y)

    rows["usual loop"] = usual_pass
    times = measure.interleaved(rows, device, repetitions=3 if arguments.quick or not cuda else 5)
    scaled = {name: [t * FULL / count for t in seconds] for name, seconds in times.items()}
    median = {name: statistics.median(seconds) for name, seconds in scaled.items()}
    split, table = {}, []
    for name in names:
        per_epoch = median[name] / (8 if name == "free-8" else 1)  # the paper counts replays as epochs
        split[name] = {
            "data": median["data"],
            "update": median["standard"] - median["data"],
            "attack": median[name] - median["standard"],
        }
        paper = f"{PAPER[name]:.2f}" if name in PAPER else ""
        spread = f"{median[name]:.3f} ({min(scaled[name]):.3f} to {max(scaled[name]):.3f})"
        table.append([name, spread, f"{per_epoch:.3f}", paper, *(f"{v:.3f}" for v in split[name].values())])
    spread = f"{median['usual loop']:.3f} ({min(scaled['usual loop']):.3f} to {max(scaled['usual loop']):.3f})"
    table.append(["usual loop, fgsm", spread, f"{median['usual loop']:.3f}", "23.41", "", "", ""])
    result = {
        "model": config.model.name,
        "images_timed": count,
        "batch_size": batch_size,
        "engine": step.engine,
        "precision": precision,
        "seconds_per_pass_of_50000": {name: measure.summary(seconds) for name, seconds in scaled.items()},
        "split": split,
        "speedup_over_usual_loop": measure.ratio(times["usual loop"], times["fgsm"]),
    }
    columns = ["method", "s per pass, median (min to max)", "s per epoch", "Table 3 (2080 Ti)", "data", "update", "attack"]
    measure.report("epoch", columns, table, result, arguments.json, device)


if __name__ == "__main__":
    main()
