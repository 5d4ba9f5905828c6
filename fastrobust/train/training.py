"""A run: epochs, metrics, the guard, checkpoints and signals, around a `Step`."""

import contextlib
import json
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrobust.attack.verdicts import arithmetic
from fastrobust.config.schema import Config
from fastrobust.data import loaders
from fastrobust.data.augment import center_crop
from fastrobust.data.held_out import evenly_spaced
from fastrobust.data.order import end_of_pass
from fastrobust.runtime import memory, run_directory
from fastrobust.runtime.background import Background
from fastrobust.runtime.distributed import ALONE, World
from fastrobust.runtime.errors import FastrobustError
from fastrobust.runtime.interrupt import Interrupted, handled
from fastrobust.runtime.progress import Progress
from fastrobust.train import checkpoint, guard, schedules, selection, step
from fastrobust.train.alignment import WINDOW
from fastrobust.train.checkpoint import Position
from fastrobust.train.curves import Curves, epoch_line
from fastrobust.train.threads import Threads

CHECKPOINT_SECONDS = 600  # the most work, about, that a kill can cost: long epochs are saved in their middle too
AGREE_EVERY = 16  # steps after which processes agree whether to stop or save; without torchrun one decides after every step


class Training:
    """One run of a resolved config. `position` says where it stands; with the tensors of the step and the state of the
    random generators it is all that a checkpoint needs.

    In a `world` of several processes each has its share of every batch, and all have the same weights after every update.
    BatchNorm sees each process's share; its running averages become their mean over the processes at the end of a pass.
    `network` is trained in place of the one that the config names."""

    def __init__(self, config: Config, directory: Path, device: torch.device, world: World = ALONE, network=None):
        self.config, self.directory, self.device, self.world, self.network = config, directory, device, world, network
        self.phases = loaders.Phases(config, device, world)
        self.loader = self.phases.enter(0)
        self.phases.check_files(len(self.loader))
        self.data_checksum = self.loader.checksum
        self.images: dict[str, dict[str, int]] = {}  # how many there are of each split and class
        self.skipped: dict[str, tuple[str, ...]] = {}  # what was left out of each split, and why
        self.tested_on = ""  # what the test images are
        self.held_out = config.selection and selection.held_out(config, self.loader.classes, device, world)
        self.step = step.build(config, self.loader, device, world, network)
        self.threads = Threads(self.step, world, config.deterministic)
        self.position = Position()
        self.history: list[dict] = []
        self.good: dict[str, Tensor] = {}  # the state after the last epoch that the guard found healthy
        self.good_epoch = 0
        self.good_robust: Tensor | None = None  # which of the guard's images were robust then
        self.best: dict[str, Tensor] = {}  # the weights that did best on the held-out images
        self.selected: dict[str, Any] | None = None  # which those are: see `selection.look`
        self.guarded: tuple[Tensor, Tensor] | None = None  # the images that the guard attacks, and their labels
        self.robust_before: Tensor | None = None  # which of them were robust after the last epoch
        self.asked: int | None = None  # the signal that this process got
        self.signum: int | None = None  # the one that all processes stop for
        self.saved = time.monotonic()
        self.writer = Background()  # of checkpoints

    # state

    @property
    def learner(self):
        return self.step.learner

    def enter_phase(self) -> None:
        """Get ready for the phase that the run stands in."""
        self.loader = self.phases.enter(self._phase_index())
        self.prepare_step()
        self.guarded = self.robust_before = None

    def _phase_index(self) -> int:
        return min(self.position.phase, len(self.config.phases) - 1)

    def prepare_step(self) -> None:
        """For the phase, and for the method that the run has come to."""
        phase = self.config.phases[self._phase_index()]
        self.step.method = guard.method_now(self.config, self.history)
        shape = phase.batch_size // self.world.size, self.loader.channels, phase.resolution
        self.step.enter_phase(*shape, phase.accumulate)

    def save(self) -> None:
        """Begins to write a checkpoint of this moment, when the one before is written; training goes on meanwhile. Raises
        what went wrong with the one before."""
        self.world.first(self.writer.wait)
        tensors, facts = checkpoint.pack(self)
        if self.world.rank == 0:
            tensors, arrive = checkpoint.to_host(tensors)

            def write() -> None:
                arrive()
                run_directory.save_checkpoint(self.directory, tensors, facts)

            self.writer.start(write)
        self.saved = time.monotonic()

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go to where a checkpoint stands. Raises RunError if it belongs to another config or other data."""
        checkpoint.unpack(self, tensors, facts)

    # training

    def train(self) -> None:
        """Train from where the run stands to its end. Raises Interrupted after a signal, and FastrobustError when the loss
        is no longer a number. The last checkpoint is on disk when this returns or raises."""
        try:
            self._train()
        except BaseException:
            with contextlib.suppress(FastrobustError):  # the first error is the one to tell
                self.writer.wait()
            raise
        self.world.first(self.writer.wait)

    def _train(self) -> None:
        config, position = self.config, self.position
        if config.guard.action == "recover" and not self.good:
            self._keep(0, None)
        steps = [schedules.steps_in(config, phase, len(self.loader)) for phase in config.phases]
        done = sum(steps[: position.phase]) + position.step
        with (
            Curves(self.directory, config, self.history, self.world) as self.curves,
            handled(self._note_signal),
            Progress("train", sum(steps), done) as bar,
        ):
            self.curves.say = bar.line
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
        key = f"phases.{position.phase}.batch_size"
        for batch in self.loader.batches(self.config.seed, position.phase, phase.batch_size, position.step, last):
            with memory.explained(self.directory, key, self.step.trial, *batch, processes=self.world.size):
                if told := self.threads.look(batch):
                    bar.line(told)
                self.step(batch)
            position.step += 1
            bar.advance(1, self._detail() if bar.due() else None)
            if position.step < last and self._agree(position.step):
                position.epoch_seconds = time.perf_counter() - began
                self._save_within_epoch()
        self._end_pass(time.perf_counter() - began, bar)

    def _end_pass(self, seconds: float, bar: Progress) -> None:
        position = self.position
        self._check_numbers()
        loss_sum, correct, seen = self.world.total(*self.step.sums())
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
        before = self.history[-1]["updates"] if self.history else 0
        noted = self.learner.alignments[max(before, record["updates"] - WINDOW) : record["updates"]].clone()
        if len(noted):
            self.world.average_([noted])
        if (noted <= 1).any():
            record["alignment"] = noted[noted <= 1].mean().item()
        self.history.append(record)
        self.learner.reset_sums()
        buffers = [b for b in self.learner.model.buffers() if b.is_floating_point()]
        buffers += [] if self.learner.average is None else self.learner.average.buffers().values()
        self.world.average_(buffers)
        chosen, asked = None, self.config.selection
        if asked and (len(self.history) % asked.every == 0 or record["epoch"] == self.config.epochs):
            chosen = selection.look(self, record)
        if self.config.method.attacks and self.config.guard.action != "off":
            self._guard()
        self.curves.draw(record)
        bar.line(epoch_line(record, self.config, bar))
        if chosen:
            bar.line(chosen)
        if "warning" in record:
            bar.line(f"warning: {record['warning']}")
        if position.stopped:
            bar.line(position.stopped)
        self.world.first(lambda: run_directory.write_metrics(self.directory, self.history))
        self.save()
        self._agree()
        self._stop_if_asked()

    def _guard(self) -> None:
        """Attack the guard's images with the radius that training has reached; on overfitting go back to the weights of the
        last healthy epoch that saw this radius."""
        settings, record, scale = self.config.guard, self.history[-1], self.step.scale_now()
        model, threat = self.learner.model, self.step.threat.scaled(scale)
        images, labels = self._guarded_images()
        alpha, seed = settings.alpha * scale, record["epoch"]
        found = guard.look(model, images, labels, threat, alpha, settings.steps, seed, self.world)
        record["guard_images"], record["guard_epsilon"] = len(labels), threat.radius
        record["guard_clean_accuracy"] = found.clean.double().mean().item()
        record["guard_accuracy"] = found.robust.double().mean().item()
        verdict = guard.verdict(self.history, self.robust_before, found.robust, settings.drop)
        self.robust_before = found.robust
        overfit = verdict is not None and verdict[0] == "overfit"
        hint = verdict or guard.disagreement(self.history)
        if (not overfit and settings.action == "stop") or (verdict is None and settings.action == "recover"):
            self._keep(record["epoch"], found.robust)
        if hint is not None:
            record["warning"] = f"{'catastrophic overfitting' if overfit else 'suspicious'}: {hint[1]}"
        if overfit and settings.action == "recover" and guard.recoveries(self.history) < guard.RECOVERIES:
            self._recover(record)
        elif overfit and settings.action != "warn":
            self._stop(record)

    def weights(self) -> dict[str, Tensor]:
        """The model's weights, and the averaged ones as `averaged.NAME`, without copying."""
        average = self.learner.average
        averaged = {} if average is None else {f"averaged.{name}": t for name, t in average.tensors.items()}
        return self.learner.model.state_dict() | averaged

    def _state(self) -> dict[str, Tensor]:
        """What the guard goes back to: the weights, and to train on from there the optimiser's state."""
        if self.config.guard.action != "recover":
            return self.weights()
        return self.weights() | {k: t for k, t in self.learner.tensors().items() if k.startswith("optimizer.")}

    def _keep(self, epoch: int, robust: Tensor | None) -> None:
        self.good = {name: t.detach().clone() for name, t in self._state().items()}
        self.good_epoch, self.good_robust = epoch, robust

    def _put_back(self) -> None:
        state = self._state()
        with torch.no_grad():
            for name, t in self.good.items():
                state[name].copy_(t)

    def _recover(self, record: dict) -> None:
        """Put back the state of the last healthy epoch, and go on from here, in the schedule and in the data, with a method
        that overfits less."""
        self._put_back()
        record[guard.WENT_BACK] = self.good_epoch
        self.prepare_step()
        self.robust_before = self.good_robust
        record["method"] = self.step.method.describe()
        place = f"epoch {self.good_epoch}" if self.good_epoch else "the start"
        record["warning"] += f"; back to the weights of {place}, and on with {record['method']}"

    def _guarded_images(self) -> tuple[Tensor, Tensor]:
        """The training images that the guard attacks, at the phase's resolution, with their labels."""
        if self.guarded is None:
            resolution = self.config.phases[self.position.phase].resolution
            numbers = evenly_spaced(len(self.loader), guard.IMAGES)
            images, labels, _ = self.loader.still(numbers)
            images = center_crop(images, resolution).to(self.device).contiguous(memory_format=torch.channels_last)
            self.guarded = images, labels.to(self.device)
        return self.guarded

    def _stop(self, record: dict) -> None:
        """End the run with the weights of the last healthy epoch, if it was trained with the radius of this one."""
        before = [r for r in self.history if r["epoch"] == self.good_epoch and self.good]
        full = None if self.config.epsilon_warmup else self.config.epsilon  # version 0.1 did not record the radius
        if before and before[0].get("guard_epsilon", full) == record["guard_epsilon"]:
            kept = f"the weights after epoch {self.good_epoch} are kept"
            self._put_back()
        else:
            kept = "no epoch with this epsilon was healthy"
        kept = "the weights that did best on the held-out images are kept" if self.selected else kept
        said = f"stopped after epoch {record['epoch']}: {record['warning']}; {kept}"
        if recoveries := guard.recoveries(self.history):
            said += f", after {recoveries} recoveries"
        self.position.stopped = f"{said}. To train on, {guard.ADVICE}"

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
        if not self.world.joined:
            self.writer.check()
        found = self.world.gather((self.asked, time.monotonic() - self.saved > CHECKPOINT_SECONDS))
        self.signum = next((asked for asked, _ in found if asked is not None), None)
        return self.signum is not None or any(late for _, late in found)

    def _stop_if_asked(self) -> None:
        if self.signum is not None:
            self.world.first(self.writer.wait)
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
        found = f"  loss {loss_sum / seen:.3f}  accuracy {correct / seen:.1%}" if seen else ""
        return f"epoch {self.epochs_done() + 1}{found}"


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
            for key in ("clean_accuracy", "robust_accuracy", "attack", "norm", "epsilon", "alpha", "examples", "resolution")
        },
        "evaluations": evaluations,
        "training_epsilon": config.epsilon,
        "training_images": len(training.loader),
        "loader": config.loader,
        "engine": config.engine,
        "epochs": epochs,
        "stopped": position.stopped,
        "recovered": [
            {key: r[key] for key in ("epoch", guard.WENT_BACK, "method")} for r in training.history if guard.WENT_BACK in r
        ],
        "train_seconds": position.train_seconds,
        "seconds_per_epoch": position.train_seconds / epochs,
        "seed": config.seed,
        "precision": config.precision,
        "arithmetic": arithmetic(training.device) if config.precision == "fp32" else config.precision,
        **json.loads((training.directory / "environment.json").read_text()),
    }
