"""Training: phases, epochs, metrics, the guard and checkpoints. The only place where all parts meet."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrobust import attacks, checkpoint, engine, guard, ibp, memory, methods, run, schedules
from fastrobust.data import loaders, sources
from fastrobust.data.augment import augment, center_crop, to_unit
from fastrobust.data.resident import Resident
from fastrobust.data.stream import end_of_pass
from fastrobust.distributed import ALONE, World
from fastrobust.errors import ConfigError, FastrobustError, first_line
from fastrobust.interrupt import Interrupted, handled
from fastrobust.learner import Learner
from fastrobust.progress import Progress, duration
from fastrobust.schema import Config

CHECKPOINT_SECONDS = 600  # the most work, about, that a kill can cost: long epochs are saved in their middle too
AGREE_EVERY = 16  # steps after which processes agree whether to stop or save; without torchrun one decides after every step


def check_model(model: nn.Module, config: Config, channels: int) -> None:
    """Raise ConfigError if the model cannot take the images of some phase, or the method not the model."""
    parameter = next(model.parameters())
    for resolution in {phase.resolution for phase in config.phases}:
        x = torch.zeros(1, channels, resolution, resolution, device=parameter.device)
        try:
            with attacks.evaluating(model), torch.no_grad():
                model(x)
                if getattr(config.method, "ibp_weight", 0):
                    ibp.worst_differences(model, x, x, torch.zeros(1, dtype=torch.int64, device=x.device))
        except RuntimeError as error:
            raise ConfigError(
                f"model.name: {config.model.name} cannot take {resolution} x {resolution} pixels ({first_line(error)})"
            ) from None


class Trainer:
    """One run, on the data that its config names or on those given. `position` says where it stands; with the tensors of
    the learner, the kept delta and the state of the random generators it is all that a checkpoint needs.

    In a `world` of several processes each has its share of every batch, and all have the same weights after every update.
    BatchNorm sees each process's share; its running averages become their mean over the processes at the end of a pass."""

    def __init__(
        self,
        config: Config,
        directory: Path,
        device: torch.device,
        data: sources.ImageSet | None = None,
        world: World = ALONE,
    ):
        self.config, self.directory, self.device, self.world = config, directory, device, world
        self.shard = (world.rank, world.size)
        self.engine = engine.choose(config.engine, device)
        engine.set_deterministic(config.deterministic)
        if data is not None:
            self.loader_name, self.loader = "resident", Resident(data, device, *self.shard)
        else:
            self.loader_name = loaders.choose(config, device)
            with world.one_after_the_other(config.data.download):
                self.loader = loaders.for_phase(config, self.loader_name, 0, device, *self.shard)
            loaders.check(config, self.loader_name, len(self.loader))
        self.loader_key, self.data_checksum = self._loader_key(0), self.loader.checksum
        torch.manual_seed(config.seed)
        model = run.build_model(config, self.loader.classes).to(device)
        check_model(model, config, self.loader.channels)
        self.learner = Learner(
            model.train(),
            config.optimizer,
            schedules.lr_table(config, len(self.loader)),
            precision=config.precision,
            attack_batchnorm=getattr(config.method, "attack_batchnorm", "train"),
        )
        if world.joined:
            self.learner.share_gradients()
        self.seed_of_rank(0)
        self.method = methods.from_config(config.method, config.epsilon)
        self.scales = schedules.epsilon_scale_table(config, len(self.loader)).to(device) if config.epsilon_warmup else None
        self.keeps_delta = config.method.name == "free" or getattr(config.method, "init", None) == "previous"
        self.position = {"phase": 0, "pass": 0, "step": 0, "epoch_seconds": 0.0, "train_seconds": 0.0, "stopped": None}
        self.history: list[dict] = []
        self.good: dict[str, Tensor] = {}  # the weights after the last epoch that the guard found healthy
        self.good_epoch = 0
        self.asked: int | None = None  # the signal that this process got
        self.signum: int | None = None  # the one that all processes stop for
        self.saved = time.monotonic()
        self.enter_phase()

    # state

    def enter_phase(self) -> None:
        """The phase's loader, if its sizes are new, and the perturbation kept between its batches."""
        index = min(self.position["phase"], len(self.config.phases) - 1)
        phase = self.config.phases[index]
        if self._loader_key(index) != self.loader_key:
            self.loader.close()
            self.loader = loaders.for_phase(self.config, self.loader_name, index, self.device, *self.shard)
            self.loader_key = self._loader_key(index)
        shape = (phase.batch_size // self.world.size, self.loader.channels, phase.resolution, phase.resolution)
        self.delta = torch.zeros(shape, device=self.device).contiguous(memory_format=torch.channels_last)
        self.step = None  # made by the engine from the first batch

    def _loader_key(self, index: int) -> tuple:
        """What makes one loader serve several phases: a resident one depends on the stored size alone."""
        phase = self.config.phases[index]
        return (phase.resize,) if self.loader_name == "resident" else (phase.resize, phase.resolution)

    def seed_of_rank(self, updates: int) -> None:
        """Random numbers of its own for every process but the first, whose go on from the making of the model."""
        if self.world.rank:
            torch.manual_seed(((self.config.seed * 1_000_003 + self.world.rank) * 1_000_003 + updates) % 2**63)

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that a training step changes, the random generators aside."""
        return self.learner.state_dict() | {"delta": self.delta.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state)
        if state["delta"].shape != self.delta.shape:
            raise RuntimeError(f"delta has shape {tuple(self.delta.shape)}, stored {tuple(state['delta'].shape)}")
        self.delta.copy_(state["delta"])

    def save(self) -> None:
        tensors, facts = checkpoint.pack(self)
        self.world.first(lambda: run.save_checkpoint(self.directory, tensors, facts))
        self.saved = time.monotonic()

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go to where a checkpoint stands. Raises RunError if it belongs to another config or other data."""
        checkpoint.unpack(self, tensors, facts)

    # training

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """images: uint8 B x C x H x W, labels: int64 B."""
        phase = self.config.phases[self.position["phase"]]
        x = to_unit(images) if self.loader.crops else augment(images, self.config.data.augment, phase.resolution)
        scale = 1.0 if self.scales is None else self.learner.now(self.scales)
        delta = self.method(self.learner, x, labels, self.delta, scale)
        if self.keeps_delta:
            self.delta.copy_(delta)

    def _trial_step(self, images: Tensor, labels: Tensor) -> None:
        """A step to see whether it fits into memory, with batches that only get smaller. It spoils the training."""
        self.step, self.delta, self.learner.shared = None, self.delta[: len(images)], None
        self.train_step(images, labels)
        self.learner.read_sums()  # waits for the device

    def train(self) -> None:
        """Train from where the run stands to its end. Raises Interrupted after a signal, and FastrobustError when the loss
        is no longer a number."""
        config, position = self.config, self.position
        n = len(self.loader)
        total = sum(schedules.steps_in(config, phase, n) for phase in config.phases)
        done = sum(schedules.steps_in(config, phase, n) for phase in config.phases[: position["phase"]]) + position["step"]
        self._open_curves()
        try:
            with handled(self._note_signal), Progress("train", total, done) as bar:
                while position["phase"] < len(config.phases) and not position["stopped"]:
                    phase = config.phases[position["phase"]]
                    while position["pass"] < config.passes(phase) and not position["stopped"]:
                        self._train_pass(phase, bar)
                    if not position["stopped"]:
                        position.update({"phase": position["phase"] + 1, "pass": 0, "step": 0})
                        if position["phase"] < len(config.phases):
                            self.enter_phase()
                    self.save()
                self._agree()
                if self.signum is not None:
                    raise Interrupted(self.signum, self.directory)
        finally:
            if self.writer is not None:
                self.writer.close()

    def _train_pass(self, phase, bar: Progress) -> None:
        position = self.position
        last = end_of_pass(position["pass"], len(self.loader), phase.batch_size)
        began = time.perf_counter() - position["epoch_seconds"]
        images = labels = None
        batch_key = f"phases.{position['phase']}.batch_size"
        for images, labels in self.loader.batches(
            self.config.seed, position["phase"], phase.batch_size, position["step"], last
        ):
            with memory.explained(self.directory, batch_key, self._trial_step, images, labels, self.world.size):
                if self.step is None:
                    self.step = engine.prepare(self.engine, self.train_step, images, labels, self)
                self.step(images, labels)
            position["step"] += 1
            bar.advance(1, self._detail() if bar.due() else None)
            if position["step"] < last and self._agree(position["step"]):
                position["epoch_seconds"] = time.perf_counter() - began
                self._save_within_epoch()
        self._check_numbers()
        loss_sum, correct, seen = self.world.total(*self.learner.read_sums())
        seconds = time.perf_counter() - began
        position["epoch_seconds"] = 0.0
        position["train_seconds"] += seconds
        position["pass"] += 1
        record = {
            "epoch": self._epochs_done(),
            "phase": position["phase"],
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
        if self.config.method.name != "standard" and self.config.guard.action != "off":
            self._guard(center_crop(images, phase.resolution), labels, bar)
        self._draw(record)
        self._epoch_line(record, bar)
        self.world.first(lambda: run.write_metrics(self.directory, self.history))
        self.save()
        self._agree()
        if self.signum is not None:
            raise Interrupted(self.signum, self.directory)

    def _guard(self, images: Tensor, labels: Tensor, bar: Progress) -> None:
        """Attack the last minibatch of the epoch, with the radius that training has reached; on overfitting go back to the
        weights of the last healthy epoch."""
        settings, record = self.config.guard, self.history[-1]
        scale = 1.0 if self.scales is None else self.learner.now(self.scales).item()
        verdicts = attacks.pgd(
            self.learner.model,
            images,
            labels,
            epsilon=self.config.epsilon * scale,
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
            self.position["stopped"] = f"stopped after epoch {record['epoch']}: {record['warning']}; {kept}"
            with torch.no_grad():
                for name, t in self.good.items():
                    model[name].copy_(t)

    def _check_numbers(self) -> None:
        """Raises FastrobustError, which names the last good checkpoint, if the epoch has spoilt the numbers."""
        trouble = self._trouble()
        if trouble is not None:
            found = f"{self.directory / run.CHECKPOINT}, of epoch {self._epochs_done()}, is the last good checkpoint"
            kept = found if self.history else "there is no earlier checkpoint"
            raise FastrobustError(f"{self.directory}: epoch {self._epochs_done() + 1}: {trouble}; {kept}")

    def _trouble(self) -> str | None:
        """What `guard.trouble` finds in any process."""
        return next((found for found in self.world.gather(guard.trouble(self.learner)) if found is not None), None)

    def _epochs_done(self) -> int:
        """Whole epochs behind us, counted as the paper does (a replay of `free` is an epoch)."""
        config, position = self.config, self.position
        before = sum(phase.epochs for phase in config.phases[: position["phase"]])
        if position["phase"] == len(config.phases):
            return before
        return before + min(position["pass"] * config.replays, config.phases[position["phase"]].epochs)

    # signals, lines and curves

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

    def _save_within_epoch(self) -> None:
        """A checkpoint in the middle of an epoch, unless the numbers are spoilt; then stop if a signal asks for it."""
        if self.signum is None:
            self._check_numbers()
        if self._trouble() is None:
            self.save()
        if self.signum is not None:
            raise Interrupted(self.signum, self.directory)

    def _detail(self) -> str:
        loss_sum, correct, seen = self.learner.read_sums()
        return f"epoch {self._epochs_done() + 1}  loss {loss_sum / seen:.3f}  accuracy {correct / seen:.1%}"

    def _epoch_line(self, record: dict, bar: Progress) -> None:
        name = "accuracy" if self.config.method.name == "standard" else "adversarial"
        text = f"epoch {record['epoch']:>3}/{self.config.epochs}  loss {record['loss']:.4f}  "
        text += f"{name} {record['train_accuracy']:.1%}  "
        if "guard_accuracy" in record:
            text += f"minibatch clean {record['guard_clean_accuracy']:.1%} PGD {record['guard_accuracy']:.1%}  "
        text += f"lr {record['learning_rate']:.2e}  {record['images_per_second']:,.0f} images/s  "
        bar.line(text + f"{duration(record['seconds'])}  {bar.time_left()} left")
        if "warning" in record:
            bar.line(f"warning: {record['warning']}")
        if self.position["stopped"]:
            bar.line(self.position["stopped"])

    def _draw(self, record: dict) -> None:
        if self.writer is None:
            return
        for name in record.keys() - {"epoch", "phase", "updates", "warning"}:
            self.writer.add_scalar(name, record[name], record["updates"])
        self.writer.flush()

    def _open_curves(self) -> None:
        """TensorBoard's events, written anew from the history: it orders files by the clock, which may have been changed.
        Process 0 alone has a writer."""
        self.writer = None
        if self.world.rank:
            return
        from torch.utils.tensorboard import SummaryWriter

        with run.explained(f"TensorBoard events cannot be written to {self.directory}"):
            for old in self.directory.glob("events.out.tfevents.*"):
                old.unlink()
            self.writer = SummaryWriter(str(self.directory))
        for record in self.history:
            self._draw(record)


def summarize(config: Config, directory: Path, trainer_facts: dict, evaluations: list[dict]) -> dict[str, Any]:
    """What `summary.json` holds. The first evaluation (the config's first epsilon) gives the headline figures."""
    history, position = trainer_facts["history"], trainer_facts["position"]
    first = evaluations[0]
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
        "epochs": history[-1]["epoch"],
        "stopped": position["stopped"],
        "train_seconds": position["train_seconds"],
        "seconds_per_epoch": position["train_seconds"] / history[-1]["epoch"],
        "seed": config.seed,
        "precision": config.precision,
        **json.loads((directory / "environment.json").read_text()),
    }
