"""Evaluation attacks: PGD with random restarts, run only on the examples that are still robust."""

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
    """Per example, bool N: `clean`, classified correctly; `robust`, correctly at every point that the attack visited.
    `after`: how many were still robust after each restart."""

    clean: Tensor
    robust: Tensor
    after: tuple[int, ...] = ()


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """Which rows of logits name their label (bool, N). A row that is not finite names none."""
    return (logits.argmax(1) == y) & logits.isfinite().all(1)


def classified(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 500) -> Tensor:
    """Which examples are classified correctly (bool, N), in fp32 and eval mode. images: uint8 N x C x H x W."""
    with evaluating(model), torch.no_grad():
        batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
        return torch.cat([correct(model(to_unit(x)), y) for x, y in batches])


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
    robust, after = clean.clone(), []
    with evaluating(model):
        graph = None
        if images.device.type == "cuda" and clean.count_nonzero() * restarts >= 4 * batch_size:
            graph = capture(model, images[:batch_size], epsilon, alpha)
        for restart in range(restarts):
            for index, start in _packed(images, robust.clone(), epsilon, batch_size, (seed, restart)):
                x, y = to_unit(images[index]), labels[index]
                delta = threat.clip_to_box(start, x)
                if graph is None:
                    robust[index] = attack(model, x, y, delta, epsilon=epsilon, alpha=alpha, steps=steps)
                else:
                    robust[index] = graph.attack(x, y, delta, steps)
                progress(restart, len(index))
            after.append(int(robust.sum()))
    return Verdicts(clean, robust, tuple(after))


def attack(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, *, epsilon: float, alpha: float, steps: int) -> Tensor:
    """One run of PGD from the start delta. Returns which examples were classified correctly at every point (bool, N).
    Broken examples leave the batch once they are a quarter of it."""
    survived = torch.ones(len(x), dtype=torch.bool, device=x.device)
    active = torch.arange(len(x), device=x.device)
    good = torch.ones_like(survived)
    for step in range(steps):
        delta = attack_step(model, x, y, delta, good, epsilon, alpha)
        if step % 5 == 0 and good.count_nonzero() <= 0.75 * len(good):
            survived[active[~good]] = False
            x, y, delta, active = x[good], y[good], delta[good], active[good]
            good = good[good]
            if len(active) == 0:
                return survived
    with torch.no_grad():
        good &= correct(model(x + delta), y)
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
        self.x, self.delta = torch.zeros_like(x), torch.zeros_like(x)
        self.y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.good = torch.ones(len(x), dtype=torch.bool, device=x.device)

    def run(self) -> None:
        self.delta.copy_(attack_step(self.model, self.x, self.y, self.delta, self.good, self.epsilon, self.alpha))

    def attack(self, x: Tensor, y: Tensor, delta: Tensor, steps: int) -> Tensor:
        """As the function `attack`."""
        for mine, given in ((self.x, x), (self.y, y), (self.delta, delta)):
            mine[: len(given)].copy_(given)
            mine[len(given) :] = given[0]
        self.good.fill_(True)
        for _ in range(steps):
            self.run()
        with torch.no_grad():
            return (self.good & correct(self.model(self.x + self.delta), self.y))[: len(x)]


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
