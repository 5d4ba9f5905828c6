"""A run: epochs, metrics, the guard, checkpoints and signals, around a `Step`."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrobust.attack.pgd import pgd
from fastrobust.config.schema import Config
from fastrobust.data import loaders
from fastrobust.data.augment import center_crop
from fastrobust.data.batch import Batch
from fastrobust.data.order import end_of_pass
from fastrobust.runtime import memory, run_directory
from fastrobust.runtime.distributed import ALONE, World
from fastrobust.runtime.errors import FastrobustError
from fastrobust.runtime.interrupt import Interrupted, handled
from fastrobust.runtime.progress import Progress
from fastrobust.train import checkpoint, guard, schedules, step
from fastrobust.train.curves import Curves, epoch_line

CHECKPOINT_SECONDS = 600  # the most work, about, that a kill can cost: long epochs are saved in their middle too
AGREE_EVERY = 16  # steps after which processes agree whether to stop or save; without torchrun one decides after every step


@dataclass
class Position:
    """Where a run stands: in its `phase`, so many whole passes and steps of that phase are done. epoch_seconds: what an
    unfinished pass has taken so far. train_seconds: all whole passes. stopped: why the guard ended the run."""

    phase: int = 0
    passes: int = 0
    step: int = 0
    epoch_seconds: float = 0.0
    train_seconds: float = 0.0
    stopped: str | None = None

    def facts(self) -> dict[str, Any]:
        """As checkpoints hold it."""
        found = asdict(self)
        return {"pass" if key == "passes" else key: value for key, value in found.items()}

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Position:
        return cls(**{"passes" if key == "pass" else key: value for key, value in facts.items()})


class Training:
    """One run of a resolved config. `position` says where it stands; with the tensors of the step and the state of the
    random generators it is all that a checkpoint needs.

    In a `world` of several processes each has its share of every batch, and all have the same weights after every update.
    BatchNorm sees each process's share; its running averages become their mean over the processes at the end of a pass."""

    def __init__(self, config: Config, directory: Path, device: torch.device, world: World = ALONE):
        self.config, self.directory, self.device, self.world = config, directory, device, world
        self.phases = loaders.Phases(config, device, world)
        self.loader = self.phases.enter(0)
        self.phases.check_files(len(self.loader))
        self.data_checksum = self.loader.checksum
        self.step = step.build(config, self.loader, device, world)
        self.position = Position()
        self.history: list[dict] = []
        self.good: dict[str, Tensor] = {}  # the weights after the last epoch that the guard found healthy
        self.good_epoch = 0
        self.asked: int | None = None  # the signal that this process got
        self.signum: int | None = None  # the one that all processes stop for
        self.saved = time.monotonic()

    # state

    @property
    def learner(self):
        return self.step.learner

    def enter_phase(self) -> None:
        """Get ready for the phase that the run stands in."""
        index = min(self.position.phase, len(self.config.phases) - 1)
        self.loader, phase = self.phases.enter(index), self.config.phases[index]
        self.step.enter_phase(phase.batch_size // self.world.size, self.loader.channels, phase.resolution)

    def save(self) -> None:
        tensors, facts = checkpoint.pack(self)
        self.world.first(lambda: run_directory.save_checkpoint(self.directory, tensors, facts))
        self.saved = time.monotonic()

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go to where a checkpoint stands. Raises RunError if it belongs to another config or other data."""
        checkpoint.unpack(self, tensors, facts)

    # training

    def train(self) -> None:
        """Train from where the run stands to its end. Raises Interrupted after a signal, and FastrobustError when the loss
        is no longer a number."""
        config, position = self.config, self.position
        steps = [schedules.steps_in(config, phase, len(self.loader)) for phase in config.phases]
        done = sum(steps[: position.phase]) + position.step
        with (
            Curves(self.directory, self.history, self.world) as self.curves,
            handled(self._note_signal),
            Progress("train", sum(steps), done) as bar,
        ):
            while position.phase < len(config.phases) and not position.stopped:
                phase = config.phases[position.phase]
                while position.passes < config.passes(phase) and not position.stopped:
                    self._train_pass(phase, bar)
                if not position.stopped:
                    position.phase, position.passes, position.step = position.phase + 1, 0, 0
                    if position.phase < len(config.phases):
                        self.enter_phase()
                self.save()
            self._agree()
            self._stop_if_asked()

    def _train_pass(self, phase, bar: Progress) -> None:
        position = self.position
        last = end_of_pass(position.passes, len(self.loader), phase.batch_size)
        began = time.perf_counter() - position.epoch_seconds
        key, batch = f"phases.{position.phase}.batch_size", None
        for batch in self.loader.batches(self.config.seed, position.phase, phase.batch_size, position.step, last):
            with memory.explained(self.directory, key, self.step.trial, *batch, processes=self.world.size):
                self.step(batch)
            position.step += 1
            bar.advance(1, self._detail() if bar.due() else None)
            if position.step < last and self._agree(position.step):
                position.epoch_seconds = time.perf_counter() - began
                self._save_within_epoch()
        self._end_pass(phase, batch, time.perf_counter() - began, bar)

    def _end_pass(self, phase, batch: Batch, seconds: float, bar: Progress) -> None:
        position = self.position
        self._check_numbers()
        loss_sum, correct, seen = self.world.total(*self.learner.read_sums())
        position.epoch_seconds = 0.0
        position.train_seconds += seconds
        position.passes += 1
        record = {
            "epoch": self.epochs_done(),
            "phase": position.phase,
            "updates": self.learner.updates.item(),
            "loss": loss_sum / seen,
            "train_accuracy": correct / seen,
            "learning_rate": self.learner.lr.item(),
            "seconds": seconds,
            "images_per_second": seen / self.config.replays / seconds,
        }
        self.history.append(record)
        self.learner.reset_sums()
        self.world.average_([b for b in self.learner.model.buffers() if b.is_floating_point()])
        if self.config.method.attacks and self.config.guard.action != "off":
            self._guard(center_crop(batch.images, phase.resolution), batch.labels)
        self.curves.draw(record)
        bar.line(epoch_line(record, self.config, bar))
        if "warning" in record:
            bar.line(f"warning: {record['warning']}")
        if position.stopped:
            bar.line(position.stopped)
        self.world.first(lambda: run_directory.write_metrics(self.directory, self.history))
        self.save()
        self._agree()
        self._stop_if_asked()

    def _guard(self, images: Tensor, labels: Tensor) -> None:
        """Attack the last minibatch of the epoch, with the radius that training has reached; on overfitting go back to the
        weights of the last healthy epoch."""
        settings, record, scale = self.config.guard, self.history[-1], self.step.scale_now()
        verdicts = pgd(
            self.learner.model,
            images,
            labels,
            threat=self.step.threat.scaled(scale),
            alpha=settings.alpha * scale,
            steps=settings.steps,
            restarts=1,
            seed=record["epoch"],
        )
        clean, robust, count = self.world.total(int(verdicts.clean.sum()), int(verdicts.robust.sum()), len(labels))
        record["guard_clean_accuracy"], record["guard_accuracy"] = clean / count, robust / count
        found = guard.verdict([r for r in self.history if r["phase"] == record["phase"]], settings.drop)
        model = self.learner.model.state_dict()
        if (found is None or found[0] == "suspect") and settings.action == "stop":
            self.good = {name: t.detach().clone() for name, t in model.items()}
            self.good_epoch = record["epoch"]
        if found is None:
            return
        record["warning"] = f"{'catastrophic overfitting' if found[0] == 'overfit' else 'suspicious'}: {found[1]}"
        if found[0] == "overfit" and settings.action == "stop":
            kept = f"the weights after epoch {self.good_epoch} are kept" if self.good else "no epoch was healthy"
            self.position.stopped = f"stopped after epoch {record['epoch']}: {record['warning']}; {kept}"
            with torch.no_grad():
                for name, t in self.good.items():
                    model[name].copy_(t)

    def _check_numbers(self) -> None:
        """Raises FastrobustError, which names the last good checkpoint, if the epoch has spoilt the numbers."""
        trouble = self._trouble()
        if trouble is not None:
            file = self.directory / run_directory.CHECKPOINT
            found = f"{file}, of epoch {self.epochs_done()}, is the last good checkpoint"
            kept = found if self.history else "there is no earlier checkpoint"
            raise FastrobustError(f"{self.directory}: epoch {self.epochs_done() + 1}: {trouble}; {kept}")

    def _trouble(self) -> str | None:
        """What `guard.trouble` finds in any process."""
        return next((found for found in self.world.gather(guard.trouble(self.learner)) if found is not None), None)

    def epochs_done(self) -> int:
        """Whole epochs behind us, counted as the paper does (a replay of `free` is an epoch)."""
        config, position = self.config, self.position
        before = sum(phase.epochs for phase in config.phases[: position.phase])
        if position.phase == len(config.phases):
            return before
        return before + min(position.passes * config.replays, config.phases[position.phase].epochs)

    # signals

    def _note_signal(self, signum: int, frame) -> None:
        if self.asked is not None:  # asked twice: stop here and now
            signal.default_int_handler(signum, frame)
        self.asked = signum

    def _agree(self, step: int = 0) -> bool:
        """Whether all processes should write a checkpoint now: one of them got a signal, which is noted, or the last one is
        long ago. Under torchrun they ask each other at some steps only; this does not wait for a GPU."""
        if self.world.joined and step % AGREE_EVERY:
            return False
        found = self.world.gather((self.asked, time.monotonic() - self.saved > CHECKPOINT_SECONDS))
        self.signum = next((asked for asked, _ in found if asked is not None), None)
        return self.signum is not None or any(late for _, late in found)

    def _stop_if_asked(self) -> None:
        if self.signum is not None:
            raise Interrupted(self.signum, self.directory)

    def _save_within_epoch(self) -> None:
        """A checkpoint in the middle of an epoch, unless the numbers are spoilt; then stop if a signal asks for it."""
        if self.signum is None:
            self._check_numbers()
        if self._trouble() is None:
            self.save()
        self._stop_if_asked()

    def _detail(self) -> str:
        loss_sum, correct, seen = self.learner.read_sums()
        return f"epoch {self.epochs_done() + 1}  loss {loss_sum / seen:.3f}  accuracy {correct / seen:.1%}"


def summarize(training: Training, evaluations: list[dict]) -> dict[str, Any]:
    """What `summary.json` holds. The first evaluation (the config's first epsilon) gives the headline figures."""
    config, position, first = training.config, training.position, evaluations[0]
    epochs = training.history[-1]["epoch"]
    return {
        "name": config.name,
        "method": config.method.name,
        "dataset": config.data.dataset,
        "model": config.model.name,
        **{
            key: first[key]
            for key in ("clean_accuracy", "robust_accuracy", "attack", "epsilon", "alpha", "examples", "resolution")
        },
        "evaluations": evaluations,
        "training_epsilon": config.epsilon,
        "training_images": len(training.loader),
        "loader": config.loader,
        "engine": config.engine,
        "epochs": epochs,
        "stopped": position.stopped,
        "train_seconds": position.train_seconds,
        "seconds_per_epoch": position.train_seconds / epochs,
        "seed": config.seed,
        "precision": config.precision,
        **json.loads((training.directory / "environment.json").read_text()),
    }
