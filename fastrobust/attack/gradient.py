"""The step along the gradient that every attack here is made of, and the losses that it climbs."""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust.attack.threat import Radius, Threat
from fastrobust.runtime.errors import ConfigError

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits N x K, labels N) -> a loss for each example, N


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No weight of the model asks for a gradient: an attack differentiates with respect to its input alone."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The largest other logit above the label's: its gradient does not fade where the softmax saturates."""
    label = F.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(label, -torch.inf).amax(1) - logits[label]


def margin_to(targets: Tensor) -> Loss:
    """The logit of a target class (int64 N) above the label's."""
    return lambda logits, y: (logits.gather(1, targets[:, None]) - logits.gather(1, y[:, None]))[:, 0]


def input_gradient(model: nn.Module, points: Tensor, y: Tensor, loss: Loss = cross_entropy) -> tuple[Tensor, Tensor]:
    """(the logits at the points, the gradient of each point's loss with respect to it). points: float N x C x H x W."""
    z = points.detach().requires_grad_()
    logits = model(z).float()
    if not logits.requires_grad:
        raise ConfigError("the model's logits have no gradient with respect to its images: attack it by square")
    (gradient,) = torch.autograd.grad(loss(logits, y).sum(), z)
    return logits.detach(), gradient


def step(
    model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, threat: Threat, alpha: Radius, loss: Loss = cross_entropy
) -> tuple[Tensor, Tensor]:
    """(the logits at x + delta, the next delta): one step of size alpha up the loss, then back into ball and box."""
    logits, gradient = input_gradient(model, x + delta, y, loss)
    return logits, threat.project(threat.step(delta, gradient, alpha), x)


def ascend(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    delta: Tensor,
    threat: Threat,
    alpha: Radius,
    steps: int,
    loss: Loss = cross_entropy,
) -> Tensor:
    """delta after so many steps, whatever is classified how on the way."""
    for _ in range(steps):
        _, delta = step(model, x, y, delta, threat, alpha, loss)
    return delta
