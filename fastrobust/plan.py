"""What a run would do and how long it would take, without doing it."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fastrobust import attacks, engine, schedules, trainer
from fastrobust.data.loaders import test_set
from fastrobust.distributed import ALONE, World
from fastrobust.evaluation import describe
from fastrobust.progress import duration
from fastrobust.schema import Config

WARM_UP, TIMED = 2, 4  # steps


def show_plan(config: Config, device: torch.device, world: World = ALONE) -> None:
    """Print the resolved config, the phases and the estimated time. The data are read and a few steps are run, so what
    would go wrong in the first seconds of the run goes wrong here."""
    console = Console(highlight=False)
    console.print(config.to_yaml(), markup=False, soft_wrap=True)
    job = trainer.Trainer(config, Path(config.output) / config.name, device, world=world)
    with world.one_after_the_other(config.data.download):
        test = test_set(config, config.evaluation.limit)
    schedule = schedules.from_config(config.schedule, config.epochs)
    table = Table("phase", "epochs", "passes", "images", "batch", "steps", "seconds/step", "time")
    total, begun, rates = 0.0, 0, []
    for index, phase in enumerate(config.phases):
        job.position["phase"] = index
        job.enter_phase()
        steps = schedules.steps_in(config, phase, len(job.loader))
        seconds = seconds_per_step(job, phase)
        points = " → ".join(f"{schedule(begun + f * phase.epochs):.3g}" for f in (0, 0.2, 0.4, 0.6, 0.8, 1))
        rates.append(f"learning rate over phase {index}, at every fifth: {points}")
        table.add_row(
            str(index),
            str(phase.epochs),
            str(config.passes(phase)),
            f"{len(job.loader)} × {phase.resolution}²",
            str(phase.batch_size),
            str(steps),
            f"{seconds:.4f}",
            duration(steps * seconds),
        )
        total += steps * seconds
        begun += phase.epochs
    console.print(table)
    for line in rates:
        console.print(line, soft_wrap=True)
    settings = config.evaluation
    evaluation = len(settings.epsilon) * settings.restarts * len(test.labels) * seconds_per_attack_step(job, test)
    evaluation *= settings.steps / world.size
    where = f"{device}, {world.size} processes" if world.size > 1 else str(device)
    radii = ", ".join(describe(e) for e in settings.epsilon)
    console.print(f"training about {duration(total)} on {where}, as measured over a few steps")
    console.print(
        f"evaluation (PGD-{settings.steps}-{settings.restarts} at epsilon {radii}, {len(test.labels)} images) "
        f"at most {duration(evaluation)}: examples that break early are left alone",
        soft_wrap=True,
    )
    console.print(f"files would go to {job.directory}/; nothing was written", soft_wrap=True)


def seconds_per_step(job: trainer.Trainer, phase) -> float:
    """The mean time of a few real steps, after a warm-up."""
    batches = job.loader.batches(job.config.seed, job.position["phase"], phase.batch_size, 0, WARM_UP + TIMED)
    began = 0.0
    for step, (images, labels) in enumerate(batches):
        if step == WARM_UP:
            job.learner.read_sums()  # waits for the device
            began = time.perf_counter()
        if job.step is None:
            job.step = engine.prepare(job.engine, job.train_step, images, labels, job)
        job.step(images, labels)
    job.learner.read_sums()
    return (time.perf_counter() - began) / TIMED


def seconds_per_attack_step(job: trainer.Trainer, test) -> float:
    """The mean time that one step of the evaluation's attack takes for one image."""
    model, count = job.learner.model, min(job.config.evaluation.batch_size, len(test.labels))
    x = test.images[:count].to(job.device).float().div(255).contiguous(memory_format=torch.channels_last)
    y, delta = test.labels[:count].to(job.device), torch.zeros_like(x)
    with attacks.evaluating(model):
        attacks.attack(model, x, y, delta, epsilon=0.0, alpha=0.0, steps=1)
        job.learner.read_sums()
        began = time.perf_counter()
        attacks.attack(model, x, y, delta, epsilon=0.0, alpha=0.0, steps=TIMED)
        job.learner.read_sums()
    return (time.perf_counter() - began) / TIMED / count
