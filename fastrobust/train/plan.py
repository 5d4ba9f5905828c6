"""What a run would do and how long it would take, without doing it."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fastrobust.attack.pgd import attack
from fastrobust.attack.verdicts import evaluating
from fastrobust.config.numbers import ball_in_words, describe
from fastrobust.config.schema import Config
from fastrobust.data import loaders
from fastrobust.runtime import half
from fastrobust.runtime.distributed import ALONE, World
from fastrobust.runtime.progress import Progress, duration
from fastrobust.train import schedules, selection, step, work
from fastrobust.train.threads import Threads

WARM_UP, TIMED = 2, 4  # steps


def show_plan(config: Config, device: torch.device, world: World = ALONE) -> None:
    """Print the resolved config, the phases and the estimated time. The data are read and a few steps are run, so what
    would go wrong in the first seconds of the run goes wrong here."""
    console = Console(highlight=False)
    console.print(config.to_yaml(width=80), markup=False, soft_wrap=True)
    phases = loaders.Phases(config, device, world)
    loader = phases.enter(0)
    phases.check_files(len(loader))
    if config.selection:
        held = selection.held_out(config, loader.classes, device, world)
    training_step = step.build(config, loader, device, world)
    with world.one_after_the_other(config.data.download):
        test = loaders.test_set(config, config.evaluation.limit).labelled_as(loader.classes, config.name)
    table = Table("phase", "epochs", "passes", "images", "batch", "steps", "s/step", "time")
    total, begun, rates = 0.0, 0, []
    settings = config.evaluation
    with Progress("measuring a few steps", len(config.phases) * (WARM_UP + TIMED) + 1 + TIMED) as bar:
        tick = lambda share=0.0: bar.advance(1, "" if bar.due() else None)
        for index, phase in enumerate(config.phases):
            loader = phases.enter(index)
            shape = phase.batch_size // world.size, loader.channels, phase.resolution
            training_step.enter_phase(*shape, phase.accumulate)
            steps = schedules.steps_in(config, phase, len(loader))
            batches = loader.batches(config.seed, index, phase.batch_size, 0, WARM_UP + TIMED)
            seconds = seconds_per_step(training_step, Threads(training_step, world, config.deterministic), batches, tick)
            times = [begun + f * phase.epochs for f in (0, 0.2, 0.4, 0.6, 0.8, 1)]
            points = " → ".join(f"{config.schedule.rate(at, config.epochs):.3g}" for at in times)
            rates.append(f"learning rate at every fifth of phase {index}:\n  {points}")
            table.add_row(
                str(index),
                str(phase.epochs),
                str(config.passes(phase)),
                f"{len(loader)} × {phase.resolution}²",
                str(phase.batch_size),
                str(steps),
                f"{seconds:.4f}",
                duration(steps * seconds),
            )
            total += steps * seconds
            begun += phase.epochs
        attack_step = seconds_per_attack_step(training_step, test, settings, tick)
    console.print(table)
    for line in rounded_epochs(config) + rates:
        console.print(line, soft_wrap=True)
    evaluation = len(settings.epsilon) * settings.restarts * settings.steps * len(test.labels) * attack_step / world.size
    where = f"{device}, {world.size} processes" if world.size > 1 else str(device)
    radii = ball_in_words(settings.epsilon[0], config.norm) + "".join(f", {describe(e)}" for e in settings.epsilon[1:])
    console.print(f"training about {duration(total)} on {where}, as measured over a few steps")
    if (each := work.of_steps(config, loader)) is not None:
        steps = [schedules.steps_in(config, phase, len(loader)) for phase in config.phases]
        pflop = sum(one * count for one, count in zip(each, steps, strict=True)) / 1e15
        console.print(f"  {pflop:.3g} PFLOP: every pass of attack and update, without guard and evaluation")
    if config.selection:
        looks = -(-sum(map(config.passes, config.phases)) // config.selection.every) * (1 if config.averaging is None else 2)
        seconds = looks * config.selection.steps * len(held.labels) * attack_step / world.size
        console.print(f"selection at most {duration(seconds)}: {len(held.labels):,} held-out images, {looks} times")
    console.print(f"evaluation at most {duration(evaluation)}: examples that break early are left alone")
    console.print(f"  PGD-{settings.steps}-{settings.restarts} at {radii}, {len(test.labels)} images", soft_wrap=True)
    console.print(f"files would go to {Path(config.output) / config.name}/; nothing was written", soft_wrap=True)


def rounded_epochs(config: Config) -> list[str]:
    """A note for each phase that trains more epochs than the config says: a pass of `free` is one for each replay."""
    found, replays = [], config.replays
    for index, phase in enumerate(config.phases):
        trained = config.passes(phase) * replays
        if trained != phase.epochs:
            asked = f"phases.{index}.epochs is {phase.epochs}, and {trained} epochs are trained"
            found.append(f"note: {asked}: a pass is {replays}, one for each replay. Choose a multiple of {replays}")
    return found


def seconds_per_step(training_step: step.Step, threads: Threads, batches, tick: Callable[[], None]) -> float:
    """The mean time of a few real steps, after a warm-up, with the threads that training would choose. `tick` is called
    after each."""
    began = 0.0
    for number, batch in enumerate(batches):
        if number == 0:
            threads.look(batch)
        if number == WARM_UP:
            training_step.learner.read_sums()  # waits for the device
            began = time.perf_counter()
        training_step(batch)
        tick()
    training_step.learner.read_sums()
    return (time.perf_counter() - began) / TIMED


def seconds_per_attack_step(training_step: step.Step, test, settings, tick: Callable[[float], None]) -> float:
    """The mean time that one step of the evaluation's attack takes for one image."""
    learner, count = training_step.learner, min(settings.batch_size, len(test.labels))
    x = test.images[:count].to(learner.device).float().div(255).contiguous(memory_format=torch.channels_last)
    threat = training_step.threat.scaled(0.0)
    y, delta = test.labels[:count].to(learner.device), torch.zeros_like(x)
    with evaluating(learner.model), half.passes(settings.precision == "bf16"):
        attack(learner.model, x, y, delta, threat=threat, alpha=0.0, steps=1, tick=tick)
        learner.read_sums()
        began = time.perf_counter()
        attack(learner.model, x, y, delta, threat=threat, alpha=0.0, steps=TIMED, tick=tick)
        learner.read_sums()
    return (time.perf_counter() - began) / TIMED / count
