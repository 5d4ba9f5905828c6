"""Evaluation attacks: PGD with random restarts, run only on the examples that are still robust."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust import threat
from fastrobust.data.augment import to_unit
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


def classified(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 500) -> Tensor:
    """Which examples are classified correctly (bool, N), in fp32 and eval mode. images: uint8 N x C x H x W."""
    with evaluating(model), torch.no_grad():
        batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
        return torch.cat([model(to_unit(x)).argmax(1) == y for x, y in batches])


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
    with evaluating(model):
        for restart in range(restarts):
            for index, start in _packed(images, robust.clone(), epsilon, batch_size, (seed, restart)):
                x, y = to_unit(images[index]), labels[index]
                survived = attack(model, x, y, threat.clip_to_box(start, x), epsilon=epsilon, alpha=alpha, steps=steps)
                robust[index] = survived
                progress(restart, len(index))
    return Verdicts(clean, robust)


def attack(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, *, epsilon: float, alpha: float, steps: int) -> Tensor:
    """One run of PGD from the start delta. Returns which examples were classified correctly at every point (bool, N).
    Broken examples leave the batch once they are a quarter of it."""
    survived = torch.ones(len(x), dtype=torch.bool, device=x.device)
    active = torch.arange(len(x), device=x.device)
    correct = torch.ones_like(survived)
    for step in range(steps + 1):
        z = (x + delta).requires_grad_(step < steps)
        logits = model(z).float()
        correct &= logits.detach().argmax(1) == y
        if step == steps:
            break
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), z)
        delta = threat.project(threat.signed_step(delta, gradient, alpha), x, epsilon)
        if step % 5 == 0 and correct.count_nonzero() <= 0.75 * len(correct):
            survived[active[~correct]] = False
            x, y, delta, active = x[correct], y[correct], delta[correct], active[correct]
            correct = correct[correct]
            if len(active) == 0:
                return survived
    survived[active[~correct]] = False
    return survived


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
