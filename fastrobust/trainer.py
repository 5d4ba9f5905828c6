"""Training: phases, epochs, metrics, the guard and checkpoints. The only place where all parts meet."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrobust import attacks, engine, guard, memory, methods, resuming, run, schedules
from fastrobust.data import loaders, sources
from fastrobust.data.augment import augment, center_crop, to_unit
from fastrobust.data.resident import Resident
from fastrobust.data.stream import end_of_pass
from fastrobust.errors import ConfigError, FastrobustError, RunError, first_line
from fastrobust.interrupt import Interrupted, handled
from fastrobust.learner import Learner
from fastrobust.progress import Progress, duration
from fastrobust.schema import Config

CHECKPOINT_SECONDS = 600  # the most work, about, that a kill can cost: long epochs are saved in their middle too


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: there is no device '{name}'; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"device: {name} is not there; this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device


def check_model(model: nn.Module, config: Config, channels: int) -> None:
    """Raise ConfigError if the model cannot take the images of some phase."""
    parameter = next(model.parameters())
    for resolution in {phase.resolution for phase in config.phases}:
        try:
            with attacks.evaluating(model), torch.no_grad():
                model(torch.zeros(1, channels, resolution, resolution, device=parameter.device))
        except RuntimeError as error:
            raise ConfigError(
                f"model.name: {config.model.name} cannot take {resolution} x {resolution} pixels ({first_line(error)})"
            ) from None


def update_epochs(config: Config, examples: int) -> list[float]:
    """When every weight update of a run takes place, in epochs. An update stands for its middle in time, so that neither
    the first nor the last of a schedule from 0 to 0 is wasted."""
    times, begun = [], 0
    for phase in config.phases:
        updates = steps_in(config, phase, examples) * config.replays
        times += [begun + (u + 0.5) / updates * phase.epochs for u in range(updates)]
        begun += phase.epochs
    return times


def lr_table(config: Config, examples: int) -> Tensor:
    """The learning rate of every weight update of a run."""
    schedule = schedules.from_config(config.schedule, config.epochs)
    return torch.tensor([schedule(epoch) for epoch in update_epochs(config, examples)])


def epsilon_scale_table(config: Config, examples: int) -> Tensor:
    """What epsilon and alpha are multiplied by at every weight update: 1, but for the epochs of `epsilon_warmup`."""
    warmup = config.epsilon_warmup
    return torch.tensor([min(1.0, epoch / warmup) if warmup else 1.0 for epoch in update_epochs(config, examples)])


def steps_in(config: Config, phase, examples: int) -> int:
    return end_of_pass(config.passes(phase) - 1, examples, phase.batch_size)


class Trainer:
    """One run, on the data that its config names or on those given. `position` says where it stands; with the tensors of
    the learner, the kept delta and the state of the random generators it is all that a checkpoint needs."""

    def __init__(self, config: Config, directory: Path, device: torch.device, data: sources.ImageSet | None = None):
        self.config, self.directory, self.device = config, directory, device
        self.engine = engine.choose(config.engine, device)
        engine.set_deterministic(config.deterministic)
        if data is not None:
            self.loader_name, self.loader = "resident", Resident(data, device)
        else:
            self.loader_name = loaders.choose(config, device)
            self.loader = loaders.for_phase(config, self.loader_name, 0, device)
            loaders.check(config, self.loader_name, len(self.loader))
        self.loader_key, self.data_checksum = self._loader_key(0), self.loader.checksum
        torch.manual_seed(config.seed)
        model = run.build_model(config, self.loader.classes).to(device)
        check_model(model, config, self.loader.channels)
        self.learner = Learner(
            model.train(),
            config.optimizer,
            lr_table(config, len(self.loader)),
            precision=config.precision,
            attack_batchnorm=getattr(config.method, "attack_batchnorm", "train"),
        )
        self.method = methods.from_config(config.method, config.epsilon)
        self.scales = epsilon_scale_table(config, len(self.loader)).to(device) if config.epsilon_warmup else None
        self.keeps_delta = config.method.name == "free" or getattr(config.method, "init", None) == "previous"
        self.position = {"phase": 0, "pass": 0, "step": 0, "epoch_seconds": 0.0, "train_seconds": 0.0, "stopped": None}
        self.history: list[dict] = []
        self.good: dict[str, Tensor] = {}  # the weights after the last epoch that the guard found healthy
        self.good_epoch = 0
        self.signum: int | None = None
        self.saved = time.monotonic()
        self.enter_phase()

    # state

    def enter_phase(self) -> None:
        """The phase's loader, if its sizes are new, and the perturbation kept between its batches."""
        index = min(self.position["phase"], len(self.config.phases) - 1)
        phase = self.config.phases[index]
        if self._loader_key(index) != self.loader_key:
            self.loader.close()
            self.loader = loaders.for_phase(self.config, self.loader_name, index, self.device)
            self.loader_key = self._loader_key(index)
        shape = (phase.batch_size, self.loader.channels, phase.resolution, phase.resolution)
        self.delta = torch.zeros(shape, device=self.device).contiguous(memory_format=torch.channels_last)
        self.step = None  # made by the engine from the first batch

    def _loader_key(self, index: int) -> tuple:
        """What makes one loader serve several phases: a resident one depends on the stored size alone."""
        phase = self.config.phases[index]
        return (phase.resize,) if self.loader_name == "resident" else (phase.resize, phase.resolution)

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that a training step changes, the random generators aside."""
        return self.learner.state_dict() | {"delta": self.delta.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state)
        if state["delta"].shape != self.delta.shape:
            raise RuntimeError(f"delta has shape {tuple(self.delta.shape)}, stored {tuple(state['delta'].shape)}")
        self.delta.copy_(state["delta"])

    def save(self) -> None:
        state = self.state_dict()
        tensors = {f"learner.{name}": t for name, t in state["tensors"].items()} | {"delta": state["delta"]}
        tensors |= {f"good.{name}": t for name, t in self.good.items()} | {"rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        facts = {
            "format": 2,
            "config": self.config.to_dict(),
            "position": self.position,
            "history": self.history,
            "scaler": state["scaler"],
            "good_epoch": self.good_epoch,
            "data": self.data_checksum,
            "examples": len(self.loader),
        }
        run.save_checkpoint(self.directory, tensors, facts)
        self.saved = time.monotonic()

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go to where a checkpoint stands. Raises RunError if it belongs to another config or other data."""
        resuming.check(self.directory, facts, self.config, self.loader)

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        try:
            self.position, self.history, self.good_epoch = facts["position"], facts["history"], facts["good_epoch"]
            self.enter_phase()
            state = {"tensors": part("learner."), "scaler": facts["scaler"], "delta": tensors["delta"]}
            self.load_state_dict(state)
            torch.set_rng_state(tensors["rng.cpu"])
        except (KeyError, RuntimeError, TypeError) as error:
            raise RunError(f"the checkpoint in {self.directory} does not fit its config: {error}") from None
        self.good = {name: t.to(self.device) for name, t in part("good.").items()}
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)

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
        self.step, self.delta = None, self.delta[: len(images)]
        self.train_step(images, labels)
        self.learner.read_sums()  # waits for the device

    def train(self) -> None:
        """Train from where the run stands to its end. Raises Interrupted after a signal, and FastrobustError when the loss
        is no longer a number."""
        config, position = self.config, self.position
        n = len(self.loader)
        total = sum(steps_in(config, phase, n) for phase in config.phases)
        done = sum(steps_in(config, phase, n) for phase in config.phases[: position["phase"]]) + position["step"]
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
                if self.signum is not None:
                    raise Interrupted(self.signum, self.directory)
        finally:
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
            with memory.explained(self.directory, batch_key, self._trial_step, images, labels):
                if self.step is None:
                    self.step = engine.prepare(self.engine, self.train_step, images, labels, self)
                self.step(images, labels)
            position["step"] += 1
            bar.advance(1, self._detail() if bar.due() else None)
            if position["step"] < last and (self.signum is not None or time.monotonic() - self.saved > CHECKPOINT_SECONDS):
                position["epoch_seconds"] = time.perf_counter() - began
                self._save_within_epoch()
        self._check_numbers()
        loss_sum, correct, seen = self.learner.read_sums()
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
        if self.config.method.name != "standard" and self.config.guard.action != "off":
            self._guard(center_crop(images, phase.resolution), labels, bar)
        self._draw(record)
        self.writer.flush()
        self._epoch_line(record, bar)
        run.write_metrics(self.directory, self.history)
        self.save()
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
        record["guard_clean_accuracy"] = verdicts.clean.float().mean().item()
        record["guard_accuracy"] = verdicts.robust.float().mean().item()
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
        trouble = guard.trouble(self.learner)
        if trouble is not None:
            found = f"{self.directory / run.CHECKPOINT}, of epoch {self._epochs_done()}, is the last good checkpoint"
            kept = found if self.history else "there is no earlier checkpoint"
            raise FastrobustError(f"{self.directory}: epoch {self._epochs_done() + 1}: {trouble}; {kept}")

    def _epochs_done(self) -> int:
        """Whole epochs behind us, counted as the paper does (a replay of `free` is an epoch)."""
        config, position = self.config, self.position
        before = sum(phase.epochs for phase in config.phases[: position["phase"]])
        if position["phase"] == len(config.phases):
            return before
        return before + min(position["pass"] * config.replays, config.phases[position["phase"]].epochs)

    # signals, lines and curves

    def _note_signal(self, signum: int, frame) -> None:
        if self.signum is not None:  # asked twice: stop here and now
            signal.default_int_handler(signum, frame)
        self.signum = signum

    def _save_within_epoch(self) -> None:
        """A checkpoint in the middle of an epoch, unless the numbers are spoilt; then stop if a signal asks for it."""
        if self.signum is None:
            self._check_numbers()
        if guard.trouble(self.learner) is None:
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
        for name in record.keys() - {"epoch", "phase", "updates", "warning"}:
            self.writer.add_scalar(name, record[name], record["updates"])

    def _open_curves(self) -> None:
        """TensorBoard's events, written anew from the history: it orders files by the clock, which may have been changed."""
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
