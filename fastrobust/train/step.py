"""One training step: the model with its learner, the method with its state, the augmentation and the engine. It knows
nothing of files, epochs or signals, and prepares itself on its first call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastrobust.attack.threat import Threat, ball
from fastrobust.attack.verdicts import check_logits, evaluating
from fastrobust.config.schema import Config
from fastrobust.config.sections import Augment
from fastrobust.data.augment import Alternation, augment, mixed, to_unit
from fastrobust.data.batch import Batch
from fastrobust.models import fused
from fastrobust.models.given import advice
from fastrobust.models.pixels import Sees
from fastrobust.models.weights import build_model
from fastrobust.runtime.distributed import ALONE, World
from fastrobust.runtime.errors import ConfigError, first_line
from fastrobust.train import engine, precision, schedules, trials
from fastrobust.train.learner import DTYPES, Learner, Part
from fastrobust.train.methods.base import Inputs, Method, Shapes


class Step:
    """`step(batch)` trains on a batch (`fastrobust.data.batch.Batch`).

    learner: the model that is trained, its optimiser and its learning rates. threat: the ball at the full epsilon. classes,
    examples: how many of each the data set has. scale_table: what epsilon and alpha are multiplied by at every update.
    augment: how images are changed, or None for none of it; crop: false for images that the loader has cropped and mirrored.
    alternation: of `flip: alternate`. engine: see `engine.py`.
    seed: of a method's first state.
    Before the first batch of a phase `enter_phase` says its shapes.
    """

    def __init__(
        self,
        learner: Learner,
        method: Method,
        threat: Threat,
        *,
        classes: int,
        examples: int,
        scale_table: Tensor | None = None,
        augment: Augment | None = None,
        crop: bool = True,
        alternation: Alternation | None = None,
        engine: str = "eager",
        seed: int = 0,
    ):
        self.learner, self.method, self.threat, self.augment, self.engine = learner, method, threat, augment, engine
        self.classes, self.examples, self.seed = classes, examples, seed
        self.crop, self.alternation = crop, alternation
        self.scales = None if scale_table is None else scale_table.to(learner.device)
        self.state: dict[str, Tensor] = {}
        self.resolution, self.parts = 0, 1
        self._run: engine.Run | None = None

    def enter_phase(self, batch_size: int, channels: int, resolution: int, parts: int = 1) -> None:
        """From here on batches have this size (of this process's part) and the model sees images of this resolution; so many
        `parts` of a batch pass through it one after the other, and make one update. The method's state is made anew, but for
        what all processes agree on and still fits; the engine prepares the step again."""
        self.resolution, self.parts, shape = resolution, parts, (batch_size, channels, resolution, resolution)
        before, agreed, self.learner.part = self.state, self.method.agreed, Part()
        self.state = self.method.state(Shapes(shape, self.classes, self.examples, self.learner.device, self.seed))
        for name in before.keys() & set(agreed):
            if before[name].shape == self.state[name].shape:
                self.state[name].copy_(before[name])
        self._run = None

    def __call__(self, batch: Batch) -> None:
        if self._run is None:
            self.learner.refresh()
            self._run = engine.prepare(self.engine, self.take, batch, self)
        self._run(batch)

    def take(self, batch: Batch) -> None:
        """The step itself, as it is run eagerly, compiled or captured."""
        settings, mirrored, y = self.augment, None, batch.labels
        if self.alternation is not None:
            mirrored = self.alternation.mirrored(self.learner.now(self.alternation.starts), batch.index)
        if settings is None:
            x = to_unit(batch.images)
        else:
            x = augment(batch.images, settings, self.resolution, self.threat.kernels, self.crop, mirrored)
            if settings.mixes:
                x, y = mixed(x, y, self.classes, settings)
        scale = 1.0 if self.scales is None else self.learner.now(self.scales)
        whole, parts = Inputs(x, y, batch.index), min(self.parts, len(x))
        if parts == 1:
            self.learner.part = Part()
            return self.method.step(self.learner, whole, self.threat, scale, self.state)
        for k in range(parts):
            places = slice(k * len(x) // parts, (k + 1) * len(x) // parts)
            part = Inputs(*(t[places] for t in whole))
            state = {name: t[places] if name in self.method.by_slot else t for name, t in self.state.items()}
            self.learner.part = Part(k == 0, k == parts - 1, len(part.y) / len(x))
            self.method.step(self.learner, part, self.threat, scale, state)

    def scale_now(self) -> float:
        """What the next update multiplies epsilon and alpha by: less than 1 while epsilon warms up. Waits for the device."""
        return 1.0 if self.scales is None else self.learner.now(self.scales).item()

    def trial(self, *batch: Tensor) -> None:
        """A step to see whether it fits into memory, with batches that only get smaller. It spoils the training."""
        self._run, self.learner.shared, size = None, None, len(batch[0])
        self.state = {name: t[:size] if name in self.method.by_slot else t for name, t in self.state.items()}
        self.take(Batch(*batch))
        self.learner.read_sums()  # waits for the device

    def sums(self) -> tuple[float, int, int]:
        """(sum of losses, correct answers, examples) since the learner's last reset. Waits for the device. Raises
        ConfigError where the method has made no update."""
        found = self.learner.read_sums()
        if not found[2]:
            told = "it must call learner.update(x, y), which trains the model and adds to the sums of loss and accuracy"
            raise ConfigError(f"method.name: the step of {self.method.name} made no update: {told}")
        return found

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that a step changes, the random generators aside."""
        return self.learner.state_dict() | {"state": {name: t.clone() for name, t in self.state.items()}}

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        """Writes in place. Raises KeyError or RuntimeError when names or shapes do not match."""
        self.learner.load_state_dict(stored)
        for name, mine in self.state.items():
            given = stored["state"][name]
            if given.shape != mine.shape:
                raise RuntimeError(f"{name} has shape {tuple(mine.shape)}, stored {tuple(given.shape)}")
            mine.copy_(given)


def build(config: Config, loader, device: torch.device, world: World = ALONE, network: nn.Module | None = None) -> Step:
    """The step of a config's run at the start of its first phase, on the images of `loader`. `network`: what is trained, in
    place of the one that the config names. Seeds the random generators: the first process's go on from the making of the
    model, every other has random numbers of its own."""
    engine.set_deterministic(config.deterministic)
    torch.manual_seed(config.seed)
    model = build_model(config, loader.classes, network).to(device, memory_format=torch.channels_last)
    check_model(model, config, loader.channels, len(loader.classes))
    kernels = engine.wants_kernels(config.engine, device)
    chosen = precision.choose(config, device, network).precision if config.precision == "auto" else config.precision
    chosen_engine = trials.engine_for(config.model_copy(update={"precision": chosen}), device, network)
    sees = Sees(model.mean, model.std, DTYPES[chosen])
    learner = Learner(
        model.train(),
        config.optimizer,
        schedules.lr_table(config, len(loader)),
        epoch_table=torch.tensor(schedules.update_epochs(config, len(loader))),
        precision=chosen,
        batchnorm_in_attack=config.method.batchnorm_in_attack,
        loss=config.loss,
        label_smoothing=config.label_smoothing,
        clip_gradients=config.clip_gradients,
        averaging=None if config.averaging is None else config.averaging.decay,
        kernels=kernels,
        reads_weights=config.method.reads_weights,
        in_parts=any(phase.accumulate > 1 for phase in config.phases),
        watched=config.guard.action != "off",
        filtering=chosen_engine == "winograd",
        numba=chosen_engine in engine.BY_NUMBA,
    )
    if world.joined:
        learner.share_gradients()
    seed_of_rank(config, world, 0)
    alternation = None
    if config.data.augment.flip == "alternate":
        starts = torch.tensor(schedules.starts(config, len(loader)))
        alternation = Alternation(starts, len(loader), config.seed, world.rank, device)
    step = Step(
        learner,
        config.method,
        ball(config.norm, config.epsilon, kernels and fused.have_kernels(device), sees),
        classes=len(loader.classes),
        examples=len(loader),
        scale_table=schedules.epsilon_scale_table(config, len(loader)) if config.epsilon_warmup else None,
        augment=config.data.augment,
        crop=not loader.crops,
        alternation=alternation,
        engine=chosen_engine,
        seed=config.seed,
    )
    phase = config.phases[0]
    step.enter_phase(phase.batch_size // world.size, loader.channels, phase.resolution, phase.accumulate)
    return step


def seed_of_rank(config: Config, world: World, updates: int) -> None:
    """Random numbers of its own for every process but the first."""
    if world.rank:
        torch.manual_seed(((config.seed * 1_000_003 + world.rank) * 1_000_003 + updates) % 2**63)


def check_model(model: nn.Module, config: Config, channels: int, classes: int) -> None:
    """Raise ConfigError if the model cannot take the images of some phase or gives no logits, or the method cannot train
    it."""
    device = next(model.parameters()).device
    for resolution in {phase.resolution for phase in config.phases}:
        x = torch.zeros(1, channels, resolution, resolution, device=device)
        try:
            with evaluating(model), torch.no_grad():
                logits = model(x)
                if not isinstance(logits, Tensor) or logits.shape != (1, classes):
                    found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
                    raise ConfigError(
                        f"model.name: {config.model.name} must give logits, N x {classes} for {classes} classes; for one "
                        f"image it gives {found}"
                    )
                check_logits(logits)
                config.method.check(model, x)
        except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
            raise ConfigError(
                f"model.name: {config.model.name} cannot take {resolution} x {resolution} pixels ({first_line(error)})"
                f"{advice(model)}"
            ) from None
