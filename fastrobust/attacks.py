"""Evaluation attacks: PGD with random restarts, and the sweep that runs any attack only on what is still robust."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust import threat
from fastrobust.data.augment import to_unit
from fastrobust.engine import record
from fastrobust.errors import first_line
from fastrobust.learner import frozen


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no weight gradients inside; every module's mode is as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with frozen(model):
            yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class Verdicts:
    """Per example, bool N: `clean`, classified correctly; `robust`, correctly at every point that the attack visited."""

    clean: Tensor
    robust: Tensor


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """Which rows of logits name their label (bool, N). A row that is not finite names none."""
    return (logits.argmax(1) == y) & logits.isfinite().all(1)


def classified(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 500) -> Tensor:
    """Which examples are classified correctly (bool, N), in fp32 and eval mode. images: uint8 N x C x H x W."""
    with evaluating(model), plain_fp32(), torch.no_grad():
        batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
        return torch.cat([correct(model(to_unit(x)), y) for x, y in batches])


@contextlib.contextmanager
def plain_fp32() -> Iterator[None]:
    """Convolutions on a GPU in full fp32: by default they may round their inputs to TF32's 10 bits."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


TOLERANCE = 1e-6  # of a pixel in [0, 1]: what rounding in fp32 may add to epsilon or to the box, and more than it does


def breaks(model: nn.Module, x: Tensor, y: Tensor, points: Tensor, epsilon: float) -> Tensor:
    """Which points count as adversarial examples of x (bool, N), whoever found them. A point further than TOLERANCE from
    the ball or the box is refused; one within it is moved to the ball and the box, and a plain forward pass in fp32
    must misclassify it there. The model is in eval mode. x, points: float N x C x H x W."""
    with torch.no_grad(), plain_fp32(), torch.autocast(x.device.type, enabled=False):
        x, points = x.float(), points.float()
        nearest = torch.minimum(torch.maximum(points, x - epsilon), x + epsilon).clamp(0, 1)
        inside = ((points - nearest).abs() <= TOLERANCE).flatten(1).all(1)
        return inside & ~correct(model(nearest), y)


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    alpha: float,
    steps: int,
    restarts: int,
    batch_size: int = 500,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda restart, examples: None,
) -> Verdicts:
    """PGD-`steps`-`restarts` in the ball of radius epsilon (Madry et al., 2017; the paper's protocol, section 5).

    An example is robust only if no point of any restart, the random start and the last step included, is misclassified;
    one such point settles it, whatever its loss. Each restart attacks only the examples that are still robust, packed
    into full batches; the noise of an example depends on (seed, restart, its place in the set) and not on which others
    are left. images: uint8 N x C x H x W on the model's device. `progress(restart, examples)` is called after each
    batch with the number of examples that it dealt with. Arithmetic is fp32.
    """
    clean = classified(model, images, labels, batch_size)
    robust = clean.clone()
    attack = Pgd(
        model, images, epsilon=epsilon, alpha=alpha, steps=steps, restarts=restarts, batch_size=batch_size, seed=seed
    )
    with evaluating(model):
        sweep(attack, images, labels, robust, after=lambda place, examples, refused: progress(place.round, examples))
    return Verdicts(clean, robust)


class Pgd:
    """PGD as an attack that `sweep` can run: a round is a restart."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        epsilon: float,
        alpha: float,
        steps: int,
        restarts: int,
        batch_size: int,
        seed: int,
    ):
        self.model, self.images, self.rounds = model, images, restarts
        self.epsilon, self.alpha, self.steps, self.batch_size, self.seed = epsilon, alpha, steps, batch_size, seed
        self.graph: StaticAttack | None = None
        self.tried = images.device.type != "cuda"

    def batches(self, number: int, alive: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.tried and alive.count_nonzero() * (self.rounds - number) >= 4 * self.batch_size:
            self.tried = True
            self.graph = capture(self.model, self.images[: self.batch_size], self.epsilon, self.alpha)
        return _packed(self.images, alive, self.epsilon, self.batch_size, (self.seed, number))

    def run(self, x: Tensor, y: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        delta, found = threat.clip_to_box(start, x), x.clone()
        if self.graph is not None:
            return self.graph.attack(x, y, delta, self.steps, found), found
        settings = {"epsilon": self.epsilon, "alpha": self.alpha, "steps": self.steps}
        return attack(self.model, x, y, delta, **settings, found=found), found


@dataclass(frozen=True)
class Place:
    """How far a sweep has come: `batches` of a round are done; `alive` (bool N) were robust when the round began."""

    round: int
    batches: int
    alive: Tensor


def sweep(
    attack,
    images: Tensor,
    labels: Tensor,
    robust: Tensor,
    *,
    epsilon: float | None = None,
    place: Place | None = None,
    after: Callable[[Place, int, int], None] = lambda place, examples, refused: None,
) -> None:
    """Run all rounds of an attack, each on the examples that are still robust when it begins; `robust` (bool N) is cleared
    in place. With epsilon, a success counts only if it also `breaks` the model; without, the attack is believed.

    An attack has `rounds`, a `model`, `batches(round, alive)`, which yields (indices of examples, start), and `run(x, y,
    start)`, which gives which examples survived (bool, N) and, for those that did not, a point (N x C x H x W). `place`
    continues a sweep; `after(place, examples, refused)` is called after each batch.
    """
    for number in range(place.round if place else 0, attack.rounds):
        resumed = place is not None and number == place.round
        alive = place.alive if resumed else robust.clone()
        for batch, (index, start) in enumerate(attack.batches(number, alive)):
            if resumed and batch < place.batches:
                continue
            x, y, refused = to_unit(images[index]), labels[index], 0
            survived, points = attack.run(x, y, start)
            broken = (~survived).nonzero()[:, 0]
            if epsilon is not None and len(broken):
                held = breaks(attack.model, x[broken], y[broken], points[broken], epsilon)
                survived[broken[~held]] = True
                refused = int((~held).sum())
            robust[index] = survived
            after(Place(number, batch + 1, alive), len(index), refused)


def attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    delta: Tensor,
    *,
    epsilon: float,
    alpha: float,
    steps: int,
    found: Tensor | None = None,
) -> Tensor:
    """One run of PGD from the start delta. Returns which examples were classified correctly at every point (bool, N);
    `found` (as x), if given, takes the first point at which each of the others was not. Broken examples leave the batch
    once they are a quarter of it."""
    survived = torch.ones(len(x), dtype=torch.bool, device=x.device)
    active = torch.arange(len(x), device=x.device)
    good = torch.ones_like(survived)

    def note(before: Tensor, delta: Tensor) -> None:
        new = (before & ~good).nonzero()[:, 0]
        if found is not None and len(new):
            found[active[new]] = x[new] + delta[new]

    for step in range(steps):
        before, point = good.clone(), delta
        delta = attack_step(model, x, y, delta, good, epsilon, alpha)
        note(before, point)
        if step % 5 == 0 and good.count_nonzero() <= 0.75 * len(good):
            survived[active[~good]] = False
            x, y, delta, active = x[good], y[good], delta[good], active[good]
            good = good[good]
            if len(active) == 0:
                return survived
    before = good.clone()
    with torch.no_grad():
        good &= correct(model(x + delta), y)
    note(before, delta)
    survived[active[~good]] = False
    return survived


def attack_step(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, good: Tensor, epsilon: float, alpha: float) -> Tensor:
    """One step of PGD. Clears `good` (in place) where x + delta is misclassified, and returns the next delta."""
    z = (x + delta).requires_grad_()
    logits = model(z).float()
    good &= correct(logits.detach(), y)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), z)
    return threat.project(threat.signed_step(delta, gradient, alpha), x, epsilon)


class StaticAttack:
    """The attack on buffers of one shape: a step can then be recorded. Smaller batches are filled up with their first
    example; examples that break stay to the end of the run, and the next restart leaves them out."""

    def __init__(self, model: nn.Module, x: Tensor, epsilon: float, alpha: float):
        self.model, self.epsilon, self.alpha = model, epsilon, alpha
        self.x, self.delta, self.found = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
        self.y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.good = torch.ones(len(x), dtype=torch.bool, device=x.device)

    def run(self) -> None:
        before, point = self.good.clone(), self.x + self.delta
        delta = attack_step(self.model, self.x, self.y, self.delta, self.good, self.epsilon, self.alpha)
        self._note(before, point)
        self.delta.copy_(delta)

    def _note(self, before: Tensor, point: Tensor) -> None:
        self.found.copy_(torch.where((before & ~self.good)[:, None, None, None], point, self.found))

    def attack(self, x: Tensor, y: Tensor, delta: Tensor, steps: int, found: Tensor | None = None) -> Tensor:
        """As the function `attack`."""
        for mine, given in ((self.x, x), (self.y, y), (self.delta, delta)):
            mine[: len(given)].copy_(given)
            mine[len(given) :] = given[0]
        self.good.fill_(True)
        for _ in range(steps):
            self.run()
        before, point = self.good.clone(), self.x + self.delta
        with torch.no_grad():
            self.good &= correct(self.model(point), self.y)
        self._note(before, point)
        good = self.good[: len(x)].clone()
        if found is not None:
            found[~good] = self.found[: len(x)][~good]
        return good


def capture(model: nn.Module, images: Tensor, epsilon: float, alpha: float) -> StaticAttack | None:
    """A StaticAttack whose step is a CUDA graph, or None (said once) where it cannot be captured."""
    try:
        static = StaticAttack(model, to_unit(images), epsilon, alpha)
        static.run = record(static.run, images.device)
        return static
    except RuntimeError as error:
        print(f"warning: no CUDA graph could be captured, attacking eagerly: {first_line(error)}", file=sys.stderr)
        return None


NOISE_CHUNK = 256  # examples whose starts are drawn together


def start_noise(images: Tensor, first: int, epsilon: float, seed: tuple[int, int]) -> Tensor:
    """The starts U(-epsilon, epsilon) of examples `first` to `first` + NOISE_CHUNK of a set, for one (seed, restart)."""
    count = min(NOISE_CHUNK, len(images) - first)
    generator = torch.Generator(images.device).manual_seed((seed[0] * 1009 + seed[1]) * 1_000_003 + first)
    noise = torch.empty(count, *images.shape[1:], device=images.device)
    return noise.uniform_(-epsilon, epsilon, generator=generator).contiguous(memory_format=torch.channels_last)


def _packed(
    images: Tensor, alive: Tensor, epsilon: float, batch_size: int, seed: tuple[int, int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(indices, starts) of the alive examples, in batches of batch_size; the last may be smaller."""
    indices, noises, count = [], [], 0
    for first in range(0, len(alive), NOISE_CHUNK):
        index = first + alive[first : first + NOISE_CHUNK].nonzero()[:, 0]
        if len(index):
            indices.append(index)
            noises.append(start_noise(images, first, epsilon, seed)[index - first])
            count += len(index)
        last = first + NOISE_CHUNK >= len(alive)
        while count >= batch_size or (count and last):
            index, noise = torch.cat(indices), torch.cat(noises)
            yield index[:batch_size], noise[:batch_size]
            indices, noises = [index[batch_size:]], [noise[batch_size:]]
            count = max(0, count - batch_size)
