"""The training methods: each is one training step, and reads like the paper's algorithm.

A method is a function of (learner, x, y, delta): `learner` gives the gradient with respect to the input and updates the
weights, x are images in [0, 1], N x C x H x W, y are labels, and delta is the perturbation kept from the last minibatch
(zeros at first; only `previous` and `free` look at it). It returns the perturbation to keep.

The gradient is taken at the point x + delta itself: no clamp stands inside the differentiated graph, so saturated pixels
have a gradient too. The attack passes compute no weight gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fastrobust import threat
from fastrobust.threat import Radius


class Learner(Protocol):
    def input_gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]: ...

    def update(self, x: Tensor, y: Tensor, box: tuple[Tensor, Tensor] | None = None, ibp_weight: float = 0.0) -> None: ...

    def update_with_input_gradient(self, x: Tensor, y: Tensor) -> Tensor: ...


def standard(learner: Learner, x: Tensor, y: Tensor, delta: Tensor) -> Tensor:
    learner.update(x, y)
    return delta


def fgsm(
    learner: Learner,
    x: Tensor,
    y: Tensor,
    delta: Tensor,
    *,
    epsilon: Radius,
    alpha: Radius,
    init: str = "random",
    clip_start: bool = True,
    ibp_weight: float = 0.0,
) -> Tensor:
    """FGSM adversarial training (paper, Algorithm 3; section 4.1 for the three starts). Without `clip_start` the gradient of
    a random start is taken where it lies, even outside the pixel box, as Algorithm 3 has it. With `ibp_weight` the update's
    loss is (1 - ibp_weight) times that of the adversarial examples plus ibp_weight times a bound on that of all points
    within epsilon (MTL-IBP; De Palma et al., 2024): such networks can be proved robust."""
    delta = start(x, delta, epsilon, init, clip_start)
    gradient, _ = learner.input_gradient(x + delta, y)
    delta = threat.project(threat.signed_step(delta, gradient, alpha), x, epsilon)
    learner.update(x + delta, y, threat.box(x, epsilon) if ibp_weight else None, ibp_weight)
    return delta


def n_fgsm(learner: Learner, x: Tensor, y: Tensor, delta: Tensor, *, radius: Radius, alpha: Radius) -> Tensor:
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
    epsilon: Radius,
    alpha: Radius,
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


def free(learner: Learner, x: Tensor, y: Tensor, delta: Tensor, *, epsilon: Radius, replays: int) -> Tensor:
    """Free adversarial training (paper, Algorithm 2): every replay of the minibatch updates the weights, and the same
    backward pass moves delta, by epsilon. delta is kept between minibatches."""
    for _ in range(replays):
        delta = threat.clip_to_box(delta, x)
        gradient = learner.update_with_input_gradient(x + delta, y)
        delta = threat.project(threat.signed_step(delta, gradient, epsilon), x, epsilon)
    return delta


def start(x: Tensor, previous: Tensor, epsilon: Radius, init: str, clip: bool = True) -> Tensor:
    """The start of an attack: zeros, U(-epsilon, epsilon), or the last minibatch's delta; cut with the pixel box, but for
    random starts without `clip`."""
    if init == "zero":
        return torch.zeros_like(x)
    if init == "previous":
        return threat.clip_to_box(previous, x)
    return threat.uniform_start(x, epsilon, clip)


def from_config(method, epsilon: float) -> Callable[[Learner, Tensor, Tensor, Tensor, Radius], Tensor]:
    """The step that a config's `method` section describes, as a function of (learner, x, y, delta, scale). `scale` is
    where the warm-up of epsilon stands, from 0 to 1: epsilon and alpha are multiplied by it."""
    name = method.name
    if name == "standard":
        return lambda learner, x, y, delta, scale: standard(learner, x, y, delta)
    if name == "free":
        return lambda learner, x, y, delta, scale: free(
            learner, x, y, delta, epsilon=epsilon * scale, replays=method.replays
        )
    if name == "n_fgsm":
        return lambda learner, x, y, delta, scale: n_fgsm(
            learner, x, y, delta, radius=method.noise * epsilon * scale, alpha=method.alpha * scale
        )
    if name == "fgsm":
        return lambda learner, x, y, delta, scale: fgsm(
            learner,
            x,
            y,
            delta,
            epsilon=epsilon * scale,
            alpha=method.alpha * scale,
            init=method.init,
            clip_start=method.clip_start,
            ibp_weight=method.ibp_weight,
        )
    return lambda learner, x, y, delta, scale: pgd(
        learner,
        x,
        y,
        delta,
        epsilon=epsilon * scale,
        alpha=method.alpha * scale,
        steps=method.steps,
        init=method.init,
        skip_misclassified=method.skip_misclassified,
    )
