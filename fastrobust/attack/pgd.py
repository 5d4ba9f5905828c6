"""PGD with random restarts (Madry et al., 2018)."""

import sys
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastrobust.attack import gradient
from fastrobust.attack.base import Attack, Setting
from fastrobust.attack.rounds import run_rounds
from fastrobust.attack.threat import Radius, Threat
from fastrobust.attack.verdicts import Verdicts, breaks, check_images, classified, correct, evaluating
from fastrobust.data.augment import to_unit
from fastrobust.runtime import half
from fastrobust.runtime.cuda_graph import record
from fastrobust.runtime.errors import ConfigError, first_line


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: Threat,
    alpha: float,
    steps: int,
    restarts: int,
    batch_size: int = 500,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda restart, examples: None,
) -> Verdicts:
    """PGD-`steps`-`restarts` within a threat (the paper's protocol, section 5).

    An example is robust only if no point of any restart, the random start and the last step included, is misclassified;
    one such point settles it, whatever its loss. Each restart attacks only the examples that are still robust, packed
    into full batches; the noise of an example depends on (seed, restart, its place in the set) and not on which others
    are left. images: uint8, or float in [0, 1], N x C x H x W on the model's device; others raise DataError.
    `progress(restart, examples)` is called after each batch with the number of examples that it dealt with. Clean verdicts
    are fp32; the steps and what they break are computed as `verdicts.arithmetic` says.
    """
    check_images(images, labels, threat)
    clean = classified(model, images, labels, batch_size)
    robust = clean.clone()
    attack = Pgd(Setting(model, images, threat, alpha, batch_size, seed), (steps, restarts))
    with evaluating(model):
        run_rounds(attack, images, labels, robust, after=lambda place, examples, refused: progress(place.round, examples))
    return Verdicts(clean, robust)


class Pgd(Attack):
    """`pgd-STEPS-RESTARTS`: a round is a restart."""

    has_alpha: ClassVar[bool] = True
    takes_bf16: ClassVar[bool] = True

    def __init__(self, setting: Setting, numbers: tuple[int, ...]):
        super().__init__(setting, numbers)
        self.steps, self.rounds = numbers
        self.threat, self.alpha, self.seed = setting.threat, setting.alpha, setting.seed
        self.static: StaticAttack | None = None
        self.tried = not setting.images.is_cuda
        if self.fixed:  # so that little of the last batch is filled up
            self.batch_size = -(-len(setting.images) // -(-len(setting.images) // setting.batch_size))
            self.model = setting.model  # `StaticAttack` fills batches up itself

    @classmethod
    def check(cls, numbers: tuple[int, ...]) -> None:
        if len(numbers) != 2 or min(numbers) < 1:
            raise ConfigError("attack: pgd is written pgd-STEPS-RESTARTS, such as pgd-50-10")

    @classmethod
    def work(cls, numbers: tuple[int, ...]) -> float:
        return float(numbers[0] * numbers[1])

    def batches(self, number: int, alive: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        if self.fixed and self.static is None:
            self.static = StaticAttack(self.model, to_unit(self.images[: self.batch_size]), self.threat, self.alpha)
        if not self.tried and alive.count_nonzero() * (self.rounds - number) >= 4 * self.batch_size:
            self.tried = True
            capture(self.static)
        return packed(self.images, alive, self.threat, self.batch_size, (self.seed, number))

    def run(self, x: Tensor, y: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        delta, found = self.threat.clip(start, x), x.clone()
        if self.static is not None:
            return self.static.attack(x, y, delta, self.steps, found), found
        settings = {"threat": self.threat, "alpha": self.alpha, "steps": self.steps, "bf16": self.bf16}
        return attack(self.model, x, y, delta, **settings, found=found, tick=self.tick), found


def attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    delta: Tensor,
    *,
    threat: Threat,
    alpha: Radius,
    steps: int,
    found: Tensor | None = None,
    tick: Callable[[float], None] = lambda share: None,
    bf16: bool = False,
) -> Tensor:
    """One run of PGD from the start delta. Returns which examples were classified correctly at every point (bool, N);
    `found` (as x), if given, takes the first point at which each of the others was not. Broken examples leave the batch
    once they are a quarter of it. `tick(share)` hears how much is done, after every step. With `bf16` the passes around are
    in bf16: a point where they misclassify counts if it `breaks` the model in fp32, and else the search goes on from there;
    the last points are all seen in fp32."""
    survived = torch.ones(len(x), dtype=torch.bool, device=x.device)
    active = torch.arange(len(x), device=x.device)
    good = torch.ones_like(survived)

    def note(right: Tensor, delta: Tensor) -> None:
        new = (good & ~right).nonzero()[:, 0]
        if bf16 and len(new):
            right = torch.ones_like(right)
            right[new] = ~breaks(model, x[new], y[new], x[new] + delta[new], threat)
            new = new[~right[new]]
        if found is not None and len(new):
            found[active[new]] = x[new] + delta[new]
        good.logical_and_(right)

    for step in range(steps):
        point = delta
        logits, delta = gradient.step(model, x, y, delta, threat, alpha)
        note(correct(logits, y), point)
        tick((step + 1) / (steps + 1))
        if step % 5 == 0 and good.count_nonzero() <= 0.75 * len(good):
            survived[active[~good]] = False
            x, y, delta, active = x[good], y[good], delta[good], active[good]
            good = good[good]
            if len(active) == 0:
                return survived
    with torch.no_grad(), half.passes(False):
        note(correct(model(x + delta), y), delta)
    survived[active[~good]] = False
    return survived


class StaticAttack:
    """The attack on buffers of one shape: cuDNN looks for its fastest kernels once, and a step can be recorded. Smaller
    batches are filled up with their first example; examples that break stay to the end of the run, and the next restart
    leaves them out."""

    def __init__(self, model: nn.Module, x: Tensor, threat: Threat, alpha: float):
        self.model, self.threat, self.alpha = model, threat, alpha
        self.x, self.delta, self.found = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
        self.y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.good = torch.ones(len(x), dtype=torch.bool, device=x.device)

    def run(self) -> None:
        point = self.x + self.delta
        logits, delta = gradient.step(self.model, self.x, self.y, self.delta, self.threat, self.alpha)
        self._note(logits, point)
        self.delta.copy_(delta)

    def _note(self, logits: Tensor, point: Tensor) -> None:
        right = correct(logits, self.y)
        self.found.copy_(torch.where((self.good & ~right)[:, None, None, None], point, self.found))
        self.good.logical_and_(right)

    def attack(self, x: Tensor, y: Tensor, delta: Tensor, steps: int, found: Tensor | None = None) -> Tensor:
        """As the function `attack`."""
        for mine, given in ((self.x, x), (self.y, y), (self.delta, delta)):
            mine[: len(given)].copy_(given)
            mine[len(given) :] = given[0]
        self.good.fill_(True)
        for _ in range(steps):
            self.run()
        point = self.x + self.delta
        with torch.no_grad():
            self._note(self.model(point), point)
        good = self.good[: len(x)].clone()
        if found is not None:
            found[~good] = self.found[: len(x)][~good]
        return good


def capture(static: StaticAttack) -> None:
    """Make its step a CUDA graph. Where it cannot be captured that is said, and the step stays as it is."""
    try:
        static.run = record(static.run, static.x.device)
    except RuntimeError as error:
        print(f"warning: no CUDA graph could be captured, attacking eagerly: {first_line(error)}", file=sys.stderr)


NOISE_CHUNK = 256  # examples whose starts are drawn together


def start_noise(images: Tensor, first: int, threat: Threat, seed: tuple[int, int]) -> Tensor:
    """The random starts of examples `first` to `first` + NOISE_CHUNK of a set, for one (seed, restart)."""
    count = min(NOISE_CHUNK, len(images) - first)
    generator = torch.Generator(images.device).manual_seed((seed[0] * 1009 + seed[1]) * 1_000_003 + first)
    noise = threat.noise((count, *images.shape[1:]), generator)
    return noise.contiguous(memory_format=torch.channels_last)


def packed(
    images: Tensor, alive: Tensor, threat: Threat, batch_size: int, seed: tuple[int, int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(indices, starts) of the alive examples, in batches of batch_size; the last may be smaller."""
    indices, noises, count = [], [], 0
    for first in range(0, len(alive), NOISE_CHUNK):
        index = first + alive[first : first + NOISE_CHUNK].nonzero()[:, 0]
        if len(index):
            indices.append(index)
            noises.append(start_noise(images, first, threat, seed)[index - first])
            count += len(index)
        last = first + NOISE_CHUNK >= len(alive)
        while count >= batch_size or (count and last):
            index, noise = torch.cat(indices), torch.cat(noises)
            yield index[:batch_size], noise[:batch_size]
            indices, noises = [index[batch_size:]], [noise[batch_size:]]
            count = max(0, count - batch_size)
