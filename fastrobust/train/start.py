"""Starting a run, going on with it, or finding it finished: one function for the train command, sweeps and benchmarks."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastrobust.config import reading
from fastrobust.config.numbers import ball_in_words
from fastrobust.config.schema import Config
from fastrobust.data import layouts, loaders
from fastrobust.data.formats import Unusable
from fastrobust.evaluation import results
from fastrobust.evaluation.accuracy import evaluate
from fastrobust.evaluation.answers import answers
from fastrobust.models import foreign
from fastrobust.models.weights import save_weights, weights_digest
from fastrobust.runtime import distributed, half, interrupt, limits, memory, run_directory
from fastrobust.runtime.command import interruptible, to_paste
from fastrobust.runtime.distributed import World
from fastrobust.runtime.errors import ConfigError, RunError
from fastrobust.runtime.files import write_json, write_text
from fastrobust.runtime.progress import Overall, duration
from fastrobust.train import changes, curves, engine, precision, selection, trials, work
from fastrobust.train.plan import rounded_epochs, show_plan
from fastrobust.train.training import Training, summarize


def command(arguments) -> int:
    """The train command."""
    changed: list[str] = []
    if arguments.resume and arguments.config and "=" in arguments.config:
        arguments.overrides.insert(0, arguments.config)
        arguments.config = None
    if arguments.resume:
        directory, config = run_directory.open_run(arguments.resume)
        if arguments.config or arguments.overrides:
            config, changed = changes.asked_for(directory, config, arguments.config, arguments.overrides)
    elif arguments.config:
        config = reading.load(arguments.config, arguments.overrides)
        directory = Path(config.output) / config.name
    else:
        raise ConfigError("name a config file, such as configs/mnist_fgsm.yaml, or use --resume RUN")
    if arguments.resume and (directory / run_directory.SUMMARY).exists():
        show_summary(read_summary(directory), directory)
        print(f"{directory} is finished")
        return 0
    with distributed.joined(config.device) as (world, device):
        warn_of_precision(config, device, world)
        if arguments.dry_run:
            curves.check(config)
            if config.model.weights:
                foreign.read(config.model.weights)
            show_plan(resolve(config, device, world), device, world)
            return 0
        if changed:
            config = world.first(lambda: loaders.resolve(config, device))
            world.first(lambda: run_directory.change(directory, config, changed))
        again = bool(arguments.resume) or distributed.restarted()
        try:
            found = interruptible(lambda: run(config, directory, device, world, again=again))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(how_to_go_on(directory)) from None
        show_summary(found, directory)
    return 0


def how_to_go_on(directory: Path) -> str:
    if (directory / run_directory.CONFIG).exists():
        return f"go on with: {to_paste('train', '--resume', directory)}"
    return "nothing was saved yet: start again with the same command, without --resume"


def warn_of_precision(config: Config, device: torch.device, world: World) -> None:
    emulated = config.precision == "fp16" or (config.precision == "bf16" and not half.has_bf16())
    if device.type == "cpu" and emulated and world.rank == 0:
        slow = "this processor emulates it, many times slower than fp32: set precision=auto"
        print(f"warning: precision {config.precision} is meant for GPUs; {slow}", file=sys.stderr, flush=True)


def resolve(config: Config, device: torch.device, world: World, network=None) -> Config:
    """The config with what `auto` stands for here; the same in all processes. Raises ConfigError or DataError."""
    config = world.first(lambda: loaders.resolve(config, device))
    config = world.first(lambda: precision.choose(config, device, network))
    return config.model_copy(update={"engine": world.first(lambda: trials.engine_for(config, device, network))})


def run(
    config: Config, directory: Path, device: torch.device, world: World, again: bool = False, network=None
) -> dict[str, Any]:
    """Train the run of a config in its directory to the end, evaluate it, and return what `summary.json` holds. With
    `again` a run that is there already goes on from its last checkpoint, or is left as it is where it is finished; without,
    it is refused. `network`: see `Training`. The processes of a world call this together; the first writes. Raises
    FastrobustError."""
    layouts.tell_again()
    begun = world.first(lambda: stored_config(directory, config, again))
    if begun and world.first((directory / run_directory.SUMMARY).exists):
        return world.first(lambda: read_summary(directory))
    if begun:
        world.first(lambda: run_directory.warn_of_changed_code(directory, begun))
        config = begun.model_copy(update={"device": config.device, "engine": engine.available(begun.engine, device)})
    else:
        together = f", {world.size} processes" if world.size > 1 else ""
        what = f"{config.name}: {config.method.name} on {config.data.dataset}, {config.model.name}, {device}{together}"
        print("\n".join([what, *rounded_epochs(config)]), flush=True)
    config = resolve(config, device, world, network)
    if begun:
        with held(directory, world), interrupt.resumable(directory):
            checkpoint = world.first(lambda: run_directory.load_checkpoint(directory))
            made = training(config, directory, device, world, network)
            if checkpoint is None:
                print(f"{directory} has no checkpoint yet: starting from the beginning", flush=True)
                load_weights(made.learner.model, config, made.loader.classes, world)
            else:
                made.restore(*checkpoint)
                print(f"{directory}: going on after {made.learner.updates.item()} updates", flush=True)
            return finish(made)
    made = training(config, directory, device, world, network)
    load_weights(made.learner.model, config, made.loader.classes, world)
    world.first(lambda: create(made))
    with held(directory, world), interrupt.resumable(directory):
        return finish(made)


def stored_config(directory: Path, config: Config, again: bool) -> Config | None:
    """The config of the run that is in the directory already, or None. Raises RunError where that is not a run of this
    config, or none at all may be there."""
    if not (directory / run_directory.CONFIG).exists():
        return None
    if not again:
        raise run_directory.taken(directory)
    stored = run_directory.open_run(directory)[1]
    if odd := reading.differences(stored, config):
        raise RunError(
            f"{directory} was begun with another config:\n  " + "\n  ".join(odd[:8]) + "\nMove it away, or rename this"
        )
    return stored


def create(training: Training) -> None:
    """The run's directory, with the lists of its images. Raises ConfigError where a run could not begin."""
    curves.check(training.config)
    directory = run_directory.create(training.config)
    names, digest = getattr(training.loader, "names", ()), loaders.digest(training.config)
    run_directory.write_images(directory, names, training.skipped, digest)


def training(config: Config, directory: Path, device: torch.device, world: World, network=None) -> Training:
    """The run, ready to train; says which images and which machine it has. The test images are read too, by the first
    process for all: what is wrong with them is better known before the training than after it. Raises Unusable with the bad
    images of both."""
    made, bad = None, []
    try:
        made = Training(config, directory, device, world, network)
    except Unusable as error:
        if world.size > 1:  # the others are not in step
            raise
        bad += error.errors

    def look_at_test_images() -> tuple[dict[str, int], tuple[str, ...], str]:
        try:
            test = loaders.test_set(config, config.evaluation.limit)
        except Unusable as error:
            raise all_unusable([*bad, *error.errors], directory) from None
        if bad:
            raise all_unusable(bad, directory)
        test = test.labelled_as(made.loader.classes, "the run")
        return counted(test.labels, test.classes), test.skipped, loaders.in_words(config, len(test.labels))

    test, skipped, tested_on = world.first(look_at_test_images)
    made.images = {"train": counted(made.loader.labels, made.loader.classes), "test": test}
    made.skipped, made.tested_on = {"train": getattr(made.loader, "skipped", ()), "test": skipped}, tested_on
    available = limits.available_memory()
    machine = f"{device}, {config.precision}, {limits.cores()} cores, {available / 1e9:.3g} GB of memory free"
    told = "\n        ".join(f"{split} {in_words(found)}" for split, found in made.images.items())
    print(f"images: {told}\n{config.loader} loader, {machine}", flush=True)
    if device.type == "cpu":  # elsewhere a lack of memory is an error with a message; here the system kills the process
        warn_of_memory(made, available)
    if config.data.balance:
        sizes = [count for count in made.images["train"].values() if count]
        each = f"every class comes {len(made.loader) // len(sizes):,} times in a pass"
        print(f"balance: {each}, of {min(sizes):,} to {max(sizes):,} images", flush=True)
    if config.data.held_out:
        apart = "the test images" if "held-out" in tested_on else "kept apart from the others and from the test images"
        apart = "on which the weights are selected" if config.selection else apart
        print(f"held out: {config.data.held_out:,} training images, {apart}", flush=True)
    return made


def warn_of_memory(made: Training, available: float) -> None:
    """Say so if a step is sure to need more memory than there is; where there is plenty, keep what is freed."""
    phases = made.config.phases
    index = max(range(len(phases)), key=lambda i: phases[i].batch_size / phases[i].accumulate * phases[i].resolution ** 2)
    size, resolution, parts = phases[index].batch_size, phases[index].resolution, phases[index].accumulate * made.world.size
    model = made.learner.model.eval()  # BatchNorm cannot train on one image
    each = memory.of_a_pass(model, torch.zeros(1, made.loader.channels, resolution, resolution))
    model.train()
    share = -(-size // parts)
    memory.keep_freed(share * each)
    if share * each > available:
        fits = int(0.5 * available / each) * parts  # a step needs more than what it keeps
        advice = f"phases.{index}.batch_size={fits} needs less" if fits else "use a smaller model or resolution"
        print(
            f"warning: a step on {share} images needs at least {share * each / 1e9:.2g} GB of memory, but "
            f"{available / 1e9:.2g} GB are free: the system may kill this run without a message; {advice}",
            file=sys.stderr,
            flush=True,
        )


def load_weights(model, config: Config, classes: tuple[str, ...], world: World = distributed.ALONE) -> None:
    """Give the model the weights of `model.weights`, if the config names any, and say so. Raises RunError or ConfigError."""
    if config.model.weights:
        told = foreign.load_into(model, config.model.weights, classes)
        if world.rank == 0:
            print(f"weights: {told}", flush=True)


def all_unusable(errors: list[str], directory: Path) -> Unusable:
    """The error about these images; where they are many, all stand in a file of the run's directory."""
    found = Unusable(errors)
    if len(errors) > 10:
        with contextlib.suppress(RunError, OSError):
            directory.mkdir(parents=True, exist_ok=True)
            file = directory / "unusable_images.txt"
            write_text(file, "\n".join(errors) + "\n")
            found.args = (f"{found}: all are listed in {file}",)
    return found


def counted(labels, classes: tuple[str, ...]) -> dict[str, int]:
    """How many images there are of each class."""
    counts = torch.bincount(torch.as_tensor(labels), minlength=len(classes)).tolist()
    return dict(zip(classes, counts, strict=True))


def in_words(counts: dict[str, int]) -> str:
    """`60,000 of 10 classes (5,421 to 6,742 each)`."""
    low, high = min(counts.values()), max(counts.values())
    each = f"{low:,} each" if low == high else f"{low:,} to {high:,} each"
    return f"{sum(counts.values()):,} of {len(counts)} classes ({each})"


@contextlib.contextmanager
def held(directory: Path, world: World) -> Iterator[None]:
    """`run_directory.held`, by the first process for all."""
    with contextlib.ExitStack() as stack:
        world.first(lambda: stack.enter_context(run_directory.held(directory)))  # which gives None
        yield


def finish(training: Training) -> dict[str, Any]:
    """Train from where the run stands to the end; then evaluate and write what came out."""
    config, directory, world = training.config, training.directory, training.world
    training.train()
    model, average = training.learner.model.eval(), training.learner.average
    if training.selected:
        model.load_state_dict(training.best)
        average = None
    settings = config.evaluation
    with world.one_after_the_other(config.data.download):
        test = loaders.test_set(config, settings.limit).labelled_as(training.loader.classes, str(directory))
    began = time.monotonic()
    common = {"steps": settings.steps, "restarts": settings.restarts, "batch_size": settings.batch_size}
    common |= {"precision": settings.precision, "norm": config.norm}
    common |= {"folder": world.first(lambda: results.keeping(directory))}
    common |= {"overall": Overall([1.0] * len(settings.epsilon) * (1 if average is None else 2))}

    def saved_and_evaluated(file: str) -> list[dict[str, Any]]:
        world.first(lambda: save_weights(directory, model, config, training.loader.classes, file))
        return [
            evaluate(model, test, epsilon=epsilon, alpha=alpha, seed=config.seed, world=world, **common)
            for epsilon, alpha in zip(settings.epsilon, settings.alpha, strict=True)
        ]

    if average is not None:
        average.swap()
    about = {"weights_sha256": weights_digest(model), "answers": answers(model, test.images.shape[1:])}
    evaluations, live = saved_and_evaluated(run_directory.WEIGHTS), []
    if average is not None:
        average.swap()
        live = saved_and_evaluated(run_directory.LIVE)
    summary = summarize(training, evaluations) | {"images": training.images, "test_images": test.checksum()} | about
    summary |= {"weights": "averaged", "evaluations_of_live_weights": live} if live else {}
    if training.selected:
        summary |= {"weights": training.selected["weights"], "selection": selection.facts(training)}
    summary |= {"chosen": test.chosen, "tested_on": training.tested_on, "held_out_images": config.data.held_out}
    summary["skipped_images"] = {split: len(found) for split, found in training.skipped.items()}
    summary["evaluation_seconds"] = round(time.monotonic() - began, 3)
    summary["processes"] = world.size
    summary["train_pflop"] = world.first(lambda: work.pflop(config, training.history, training.loader, training.network))
    world.first(lambda: write_json(directory / run_directory.SUMMARY, summary))
    return summary


def read_summary(directory: Path) -> dict[str, Any]:
    """What a finished run's summary.json holds. Raises RunError."""
    file = directory / run_directory.SUMMARY
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        table_of(summary)
        return summary
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise RunError(f"{file} is damaged: delete it, and --resume evaluates again") from None


def table_of(summary: dict[str, Any]) -> Table:
    title = f"{summary['name']}: {summary['method']}, {summary['model']} on {summary['dataset']}"
    table = Table(title=title, title_justify="left")
    for heading in ("images", "accuracy", "examples"):
        table.add_column(heading, justify="left" if heading == "images" else "right")
    table.add_row("clean", f"{summary['clean_accuracy']:.2%}", str(summary["examples"]))
    for e in summary["evaluations"]:
        words = f"{e['attack']}, {ball_in_words(e['epsilon'], e.get('norm', 'linf'))}"
        words += ", steps in bf16" * (e.get("arithmetic") == "bf16")
        table.add_row(words, f"{e['robust_accuracy']:.2%}", str(e["examples"]))
    for e in summary.get("evaluations_of_live_weights", []):
        words = f"weights before averaging: {e['attack']}, {ball_in_words(e['epsilon'], e.get('norm', 'linf'))}"
        table.add_row(words, f"{e['robust_accuracy']:.2%}", str(e["examples"]))
    return table


def show_summary(summary: dict[str, Any], directory: Path) -> None:
    console = Console(highlight=False)
    console.print(table_of(summary))
    if "selection" in summary:
        console.print(selection.in_words(summary["selection"]), soft_wrap=True)
    if "held-out" in summary.get("tested_on", ""):
        console.print(f"the test images: {summary['tested_on']}", soft_wrap=True)
    for r in summary.get("recovered", ()):
        told = f"overfitting in epoch {r['epoch']}: back to epoch {r['went_back_to']}, and on with {r['method']}"
        console.print(f"note: {told}", markup=False, soft_wrap=True)
    if summary["stopped"]:
        console.print(f"warning: {summary['stopped']}", markup=False, soft_wrap=True)
    per_epoch = duration(summary["seconds_per_epoch"])
    console.print(
        f"trained in {duration(summary['train_seconds'])} ({per_epoch} per epoch); files in {directory}/",
        soft_wrap=True,
    )
    if (pflop := summary.get("train_pflop")) is not None:
        console.print(f"training took {pflop:.3g} PFLOP, attack and update together")
    console.print(f"evaluate again:  {to_paste('evaluate', directory)}", markup=False, soft_wrap=True)
    console.print(f'use it:          model = fastrobust.load("{directory}")', markup=False, soft_wrap=True)
