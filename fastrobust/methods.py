"""The training methods: each is one training step, and reads like the paper's algorithm.

A method is a function of (learner, x, y, delta): `learner` gives the gradient with respect to the input and updates the
weights, x are images in [0, 1], N x C x H x W, y are labels, and delta is the perturbation kept from the last minibatch
(zeros at first; only `previous` and `free` look at it). It returns the perturbation to keep.

The gradient is taken at the point x + delta, which already lies in the pixel box: no clamp stands inside the
differentiated graph, so saturated pixels have a gradient too. The attack passes compute no weight gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fastrobust import threat


class Learner(Protocol):
    def input_gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]: ...

    def update(self, x: Tensor, y: Tensor) -> None: ...

    def update_with_input_gradient(self, x: Tensor, y: Tensor) -> Tensor: ...


Step = Callable[[Learner, Tensor, Tensor, Tensor], Tensor]


def standard(learner: Learner, x: Tensor, y: Tensor, delta: Tensor) -> Tensor:
    learner.update(x, y)
    return delta


def fgsm(
    learner: Learner, x: Tensor, y: Tensor, delta: Tensor, *, epsilon: float, alpha: float, init: str = "random"
) -> Tensor:
    """FGSM adversarial training (paper, Algorithm 3; section 4.1 for the three starts)."""
    delta = start(x, delta, epsilon, init)
    gradient, _ = learner.input_gradient(x + delta, y)
    delta = threat.project(threat.signed_step(delta, gradient, alpha), x, epsilon)
    learner.update(x + delta, y)
    return delta


def n_fgsm(learner: Learner, x: Tensor, y: Tensor, delta: Tensor, *, radius: float, alpha: float) -> Tensor:
    """N-FGSM (de Jorge et al., 2022, Algorithm 1): stronger noise, a step of alpha = epsilon, no clipping to the ball."""
    delta = threat.uniform_start(x, radius)
    gradient, _ = learner.input_gradient(x + delta, y)
    delta = threat.clip_to_box(threat.signed_step(delta, gradient, alpha), x)
    learner.update(x + delta, y)
    return delta


def pgd(
    learner: Learner,
    x: Tensor,
    y: Tensor,
    delta: Tensor,
    *,
    epsilon: float,
    alpha: float,
    steps: int,
    init: str = "random",
    skip_misclassified: bool = False,
) -> Tensor:
    """PGD adversarial training (paper, Algorithm 1). With `skip_misclassified` an example that is already misclassified
    does not move (the authors' MNIST code)."""
    delta = start(x, delta, epsilon, init)
    for _ in range(steps):
        gradient, correct = learner.input_gradient(x + delta, y)
        moved = threat.project(threat.signed_step(delta, gradient, alpha), x, epsilon)
        delta = torch.where(correct[:, None, None, None], moved, delta) if skip_misclassified else moved
    learner.update(x + delta, y)
    return delta


def free(learner: Learner, x: Tensor, y: Tensor, delta: Tensor, *, epsilon: float, replays: int) -> Tensor:
    """Free adversarial training (paper, Algorithm 2): every replay of the minibatch updates the weights, and the same
    backward pass moves delta, by epsilon. delta is kept between minibatches."""
    for _ in range(replays):
        delta = threat.clip_to_box(delta, x)
        gradient = learner.update_with_input_gradient(x + delta, y)
        delta = threat.project(threat.signed_step(delta, gradient, epsilon), x, epsilon)
    return delta


def start(x: Tensor, previous: Tensor, epsilon: float, init: str) -> Tensor:
    """The start of an attack: zeros, U(-epsilon, epsilon), or the last minibatch's delta, cut with the pixel box."""
    if init == "zero":
        return torch.zeros_like(x)
    if init == "previous":
        return threat.clip_to_box(previous, x)
    return threat.uniform_start(x, epsilon)


def from_config(method, epsilon: float) -> Step:
    """The step that a config's `method` section describes."""
    if method.name == "standard":
        return standard
    if method.name == "fgsm":
        return functools.partial(fgsm, epsilon=epsilon, alpha=method.alpha, init=method.init)
    if method.name == "n_fgsm":
        return functools.partial(n_fgsm, radius=method.noise * epsilon, alpha=method.alpha)
    if method.name == "pgd":
        return functools.partial(
            pgd,
            epsilon=epsilon,
            alpha=method.alpha,
            steps=method.steps,
            init=method.init,
            skip_misclassified=method.skip_misclassified,
        )
    return functools.partial(free, epsilon=epsilon, replays=method.replays)
