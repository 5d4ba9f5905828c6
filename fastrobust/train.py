"""Train a robust classifier: python -m fastrobust.train CONFIG [key=value ...]"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fastrobust import config as config_module
from fastrobust import interrupt
from fastrobust.cli import main_with_errors


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m fastrobust.train", description=__doc__.splitlines()[0])
    p.add_argument("config", nargs="?", help="a YAML file, such as configs/mnist_fgsm.yaml")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="such as epsilon=4/255 phases.0.epochs=5 seed=1")
    p.add_argument("--dry-run", action="store_true", help="print the resolved config, the plan and the estimated time")
    p.add_argument("--resume", metavar="RUN", help="go on with the run in this directory")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_intermixed_args(argv)
    if arguments.config and "=" in arguments.config and arguments.resume:
        arguments.overrides.insert(0, arguments.config)
        arguments.config = None
    return main_with_errors(lambda: start(arguments))


def start(arguments: argparse.Namespace) -> int:
    from fastrobust.errors import ConfigError

    if arguments.resume:
        return resume(arguments)
    if not arguments.config:
        raise ConfigError("name a config file, such as configs/mnist_fgsm.yaml, or use --resume RUN")
    config = config_module.load(arguments.config, arguments.overrides)
    from fastrobust import distributed

    with distributed.joined(config.device) as (world, device):
        return begin(config, world, device, arguments.dry_run)


def begin(config, world, device, dry_run: bool) -> int:
    """A new run; or the same one, where torchrun has started its processes anew."""
    from fastrobust import distributed, run, trainer

    directory = Path(config.output) / config.name
    if device.type == "cpu" and config.precision != "fp32" and world.rank == 0:
        slow = "most CPUs emulate it, many times slower than fp32: set precision=fp32"
        print(f"warning: precision {config.precision} is meant for GPUs; {slow}", file=sys.stderr, flush=True)
    if dry_run:
        from fastrobust.plan import show_plan

        show_plan(config, device, world)
        return 0
    if world.first((directory / run.CONFIG).exists):
        if distributed.restarted():
            return go_on(directory, config, world, device)
        world.first(lambda: run.create(config))  # says so, before any data is read
    together = f", {world.size} processes" if world.size > 1 else ""
    print(
        f"{config.name}: {config.method.name} on {config.data.dataset}, {config.model.name}, {device}{together}", flush=True
    )
    job = trainer.Trainer(config, directory, device, world=world)
    if job.loader_name != "resident" or config.loader != "auto":
        print(f"loader: {job.loader_name}, {len(job.loader)} images", flush=True)
    world.first(lambda: run.create(config))
    with held(directory, world), interrupt.resumable(directory):
        return finish(job)


@contextlib.contextmanager
def held(directory: Path, world) -> Iterator[None]:
    """`run.held`, by the first process for all."""
    from fastrobust import run

    with contextlib.ExitStack() as stack:
        world.first(lambda: stack.enter_context(run.held(directory)))  # which gives None
        yield


def resume(arguments: argparse.Namespace) -> int:
    from fastrobust import distributed, run
    from fastrobust.errors import RunError

    directory, config = run.open_run(arguments.resume)
    if arguments.config or arguments.overrides:
        base = config_module.load(arguments.config, arguments.overrides) if arguments.config else None
        if base is None:
            raise RunError(
                f"--resume goes on with the config in {directory}: {' '.join(arguments.overrides)} cannot change it"
            )
        odd = config_module.differences(config, base)
        if odd:
            raise RunError(
                f"{directory} was begun with another config than {arguments.config}:\n  "
                + "\n  ".join(odd[:8])
                + f"\nResume without naming a config (`--resume {directory}`), or start a new run with `name=NAME`"
            )
    if (directory / run.SUMMARY).exists():
        try:
            show_summary(json.loads((directory / run.SUMMARY).read_text()), directory)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise RunError(f"{directory / run.SUMMARY} is damaged: delete it, and --resume evaluates again") from None
        print(f"{directory} is finished")
        return 0
    with distributed.joined(config.device) as (world, device):
        return go_on(directory, config, world, device)


def go_on(directory: Path, config, world, device) -> int:
    """Train an unfinished run to its end, from its last checkpoint."""
    from fastrobust import run, trainer

    with held(directory, world), interrupt.resumable(directory):
        stored = world.first(lambda: run.load_checkpoint(directory))
        job = trainer.Trainer(config, directory, device, world=world)
        if stored is None:
            print(f"{directory} has no checkpoint yet: starting from the beginning", flush=True)
        else:
            job.restore(*stored)
            print(f"{directory}: going on after {job.learner.updates.item()} updates", flush=True)
        return finish(job)


def finish(job) -> int:
    """Train to the end, then evaluate and write what came out. Several processes share both; the first writes."""
    from fastrobust import evaluation, run, trainer
    from fastrobust.data import loaders

    config, directory, world = job.config, job.directory, job.world
    job.train()
    model = job.learner.model.eval()
    world.first(lambda: run.save_weights(directory, model, config, job.loader.classes))
    settings = config.evaluation
    with world.one_after_the_other(config.data.download):
        test = loaders.test_set(config, settings.limit)
    began = time.monotonic()
    evaluations = [
        evaluation.evaluate(
            model,
            test,
            epsilon=epsilon,
            alpha=epsilon / 4 if settings.alpha is None else settings.alpha,
            steps=settings.steps,
            restarts=settings.restarts,
            batch_size=settings.batch_size,
            seed=config.seed,
            world=world,
        )
        for epsilon in settings.epsilon
    ]
    facts = {"history": job.history, "position": job.position}
    summary = trainer.summarize(config, directory, facts, evaluations)
    summary["evaluation_seconds"] = round(time.monotonic() - began, 3)
    summary["processes"] = world.size
    world.first(lambda: run.write_json(directory / run.SUMMARY, summary))
    show_summary(summary, directory)
    return 0


def show_summary(summary: dict, directory: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from fastrobust.evaluation import describe
    from fastrobust.progress import duration

    table = Table(
        title=f"{summary['name']}: {summary['method']}, {summary['model']} on {summary['dataset']}",
        title_justify="left",
    )
    for heading in ("images", "accuracy", "examples"):
        table.add_column(heading, justify="left" if heading == "images" else "right")
    table.add_row("clean", f"{summary['clean_accuracy']:.2%}", str(summary["examples"]))
    for e in summary["evaluations"]:
        table.add_row(f"{e['attack']}, epsilon {describe(e['epsilon'])}", f"{e['robust_accuracy']:.2%}", str(e["examples"]))
    console = Console(highlight=False)
    console.print(table)
    if summary["stopped"]:
        console.print(f"warning: {summary['stopped']}", markup=False, soft_wrap=True)
    per_epoch = duration(summary["seconds_per_epoch"])
    console.print(
        f"trained in {duration(summary['train_seconds'])} ({per_epoch} per epoch); files in {directory}/",
        soft_wrap=True,
    )
    console.print(f"evaluate again:  python -m fastrobust.evaluate {directory}", soft_wrap=True)
    console.print(f'use it:          model = fastrobust.load("{directory}")', markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
