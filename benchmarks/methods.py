"""The training methods side by side: how robust each is, and what that costs.

    python -m benchmarks.methods --seeds 3 --minutes 600    # CIFAR-10, the PreActResNet-18, 30 epochs: for a GPU
    python -m benchmarks.methods --scale small              # a miniature for one CPU core: hours
    python -m benchmarks.methods --scale small --costs      # seconds and memory of a step; trains nothing

Every run is trained, attacked with PGD-50-10 and AutoAttack, and written to a file of its own: the first seed of all methods
with equal epochs, then with equal cost, then the next seed. A call that was interrupted, or ran out of its minutes, goes on
when it is repeated. Runs that have a file are left out, so that several machines can add to one folder, or their folders can
be given together. What was measured for benchmarks/RECORDS.md:

    python -m benchmarks.methods --scale small --show --results benchmarks/results/methods"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks import jobs, method_costs, method_tables
from benchmarks import method_setting as setting
from benchmarks.method_setting import METHODS, RUNS, SCHEDULES, Job
from benchmarks.reproduce import both, source_of
from fastrobust.__main__ import count
from fastrobust.attack.base import parse
from fastrobust.evaluation import results
from fastrobust.evaluation.accuracy import attack_names, report, run_attacks
from fastrobust.evaluation.trained import open_trained
from fastrobust.reporting.stored import read_run
from fastrobust.runtime import distributed, machine, run_directory
from fastrobust.runtime.command import main_with_errors
from fastrobust.runtime.errors import ConfigError, RunError
from fastrobust.runtime.files import write_json
from fastrobust.train import start as training

ATTACK = "autoattack"


def run(job: Job, folder: Path, scale: str, device: str, data: str | None) -> None:
    """Train, evaluate, and write the result. Raises FastrobustError."""
    config, file = setting.config_of(scale, job, device, data), folder / f"{job.name}.json"
    if file.exists():
        raise RunError(f"{file} is of another setting: move it away, and the run is trained with today's")
    directory = Path(config.output) / config.name
    only_read = (directory / run_directory.SUMMARY).exists()
    place = distributed.pick_device(config.device)
    training.run(config, directory, place, distributed.ALONE, again=True)
    one = read_run(directory)
    summary, hardware = one.summary, one.summary.hardware
    if not only_read:
        hardware = both(hardware, machine.environment(config.device)["hardware"])
    found = {
        "method": job.method,
        "epochs": job.epochs,
        "seed": job.seed,
        "scale": scale,
        "schedules": [s for s in SCHEDULES if setting.epochs(scale, job.method, s) == job.epochs],
        "forward_passes": setting.passes(config.method),
        "cost": setting.cost(config.method, job.epochs),
        "data": source_of(one.config),
        **attacked(directory, place),
        "trained": time.strftime("%Y-%m-%d", time.gmtime((directory / run_directory.SUMMARY).stat().st_mtime)),
        "train_seconds": summary.train_seconds,
        "hardware": hardware,
        "versions": summary.versions,
        "commit": summary.commit,
        "warnings": [f"epoch {r.epoch}: {r.warning}" for r in one.history if r.warning],
        "history": [r.model_dump(exclude_none=True) for r in one.history],
        "config": one.config.to_dict(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, found)


def attacked(directory: Path, device) -> dict:
    """Clean accuracy, that under the run's own PGD, and under AutoAttack, of the same weights on the same images. What
    AutoAttack has found is kept in the run's folder and goes on there."""
    trained = open_trained(directory, device=device)
    summary, config = read_run(directory).summary, trained.config
    test = trained.images(config.evaluation.limit)
    if summary.test_images != test.checksum():
        raise RunError(f"{directory}: the test images are no longer those that PGD attacked. Put them back")
    (directory / results.FOLDER).mkdir(exist_ok=True)
    epsilon, evaluation = config.epsilon, config.evaluation
    settings = {"epsilon": epsilon, "alpha": evaluation.alpha_at(epsilon), "batch_size": evaluation.batch_size}
    records = run_attacks(
        trained.model, test, attack_names(ATTACK), **settings, seed=config.seed, folder=directory / results.FOLDER
    )
    pgd, strong = summary.evaluations[0].model_dump(), report(ATTACK, records)
    kept = ("attack", "robust_accuracy", "robust_interval", "seconds")
    return {
        "images": test.checksum(),
        "chosen": test.chosen,
        "weights": trained.digest,
        "examples": strong["examples"],
        "epsilon": epsilon,
        "clean_accuracy": strong["clean_accuracy"],
        "clean_interval": strong["clean_interval"],
        "pgd": {key: pgd[key] for key in kept},
        "autoattack": {key: strong[key] for key in kept}
        | {"broken": {r.settings["attack"]: int(r.broken.sum()) for r in records}},
    }


def wanted(scale: str, methods: list[str], seeds: int) -> list[Job]:
    """The most telling first; a run that two schedules share stands once."""
    every = [Job(m, setting.epochs(scale, m, s), seed) for seed in range(seeds) for s in SCHEDULES for m in methods]
    return list(dict.fromkeys(every))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--scale", choices=list(setting.FILES), default="full")
    p.add_argument("--methods", nargs="+", metavar="METHOD", default=list(METHODS), help=f"of {', '.join(METHODS)}")
    p.add_argument("--seeds", type=count, default=1)
    jobs.add_options(p)
    p.add_argument(
        "--results",
        metavar="FOLDER",
        nargs="+",
        default=[str(RUNS / "results")],
        help="of the result files: all are read, new ones go to the first (default: %(default)s)",
    )
    p.add_argument("--costs", action="store_true", help="train nothing: measure seconds and memory of a step, in turn")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return main_with_errors(lambda: start(arguments))


def start(arguments: argparse.Namespace) -> int:
    scale, folders = arguments.scale, [Path(folder) / arguments.scale for folder in arguments.results]
    if odd := [name for name in arguments.methods if name not in METHODS]:
        raise ConfigError(f"--methods: there is no '{odd[0]}'; there are {', '.join(METHODS)}")
    jobs.check(arguments.minutes)
    left_open: list[str] = []
    if arguments.costs:
        method_costs.measure_all(scale, arguments.methods, folders[0], arguments.device)
    elif not arguments.show:
        for name in attack_names(ATTACK):
            parse(name)[0].made_by()  # an error where the package is missing: now, and not after the first training
        settings = (folders[0], scale, arguments.device, arguments.data)
        there = {r.job for r in method_tables.read_all(folders) if method_tables.of_today(scale, r)}
        todo = [job for job in wanted(scale, arguments.methods, arguments.seeds) if job not in there]
        left_open = jobs.work([(job.name, partial(run, job, *settings)) for job in todo], arguments.minutes)
    comparison = method_tables.compare(scale, folders, arguments.methods)
    print(method_tables.as_markdown(comparison))
    file = folders[0].parent / f"{scale}.html"
    method_tables.write_page(file, comparison, left_open)
    print(f"{file}: the same, with the plot")
    for line in left_open:
        print(f"open: {line}")
    return 1 if left_open else 0


if __name__ == "__main__":
    sys.exit(main())
