"""AWP (Wu et al., 2020, "Adversarial Weight Perturbation Helps Robust Generalization"), around any other method."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fastrobust.attack.threat import Threat
from fastrobust.config.fields import NonNegative, Number, key
from fastrobust.config.sections import named
from fastrobust.train.learner import Learner, Loss
from fastrobust.train.methods.base import Inputs, Method, Scale, Shapes


@contextlib.contextmanager
def moved_weights(learner: Learner, x: Tensor, y: Tensor, loss: Loss, gamma: Tensor) -> Iterator[None]:
    """Inside, the model's weights (not biases, nor BatchNorm's) stand where they raise the loss at x most, each layer's
    moved by gamma times its norm. The gradient of what is computed there is that of the weights themselves, so that nothing
    has to be moved back."""
    weights = {name: p for name, p in learner.model.named_parameters() if p.dim() > 1 and p.requires_grad}
    copies = {name: p.detach().requires_grad_() for name, p in weights.items()}
    buffers = {name: b.clone() for name, b in learner.model.named_buffers()}  # this pass leaves the running averages alone
    learner.moved = buffers | copies
    try:
        value = loss(learner.forward(x.detach()), y)
        unused = {"allow_unused": True, "materialize_grads": True}
        gradients = [
            learner.mean(g) for g in torch.autograd.grad(value, list(copies.values()), learner.scale_of(value), **unused)
        ]
        learner.moved = {
            name: p + gamma * p.detach().norm() * (g / g.norm()).nan_to_num(0.0, 0.0, 0.0)
            for (name, p), g in zip(weights.items(), gradients, strict=True)
        }
        yield
    finally:
        learner.moved = None


class Awp(Method):
    """The method `of`, whose updates see the moved weights."""

    soft_labels = property(lambda self: self.of.soft_labels)
    name: Literal["awp"]
    of: named("method") = key("the method whose updates see moved weights", values="a `method` section")
    gamma: NonNegative | None = key(
        "how far each layer's weights are moved, by their norm", None, "0.01; 0.005 around `trades`"
    )
    begin: Number = key("when that begins", 0.05, values="0 to 1, a share of training", ge=0, le=1)

    attacks = property(lambda self: self.of.attacks)
    one_step = property(lambda self: self.of.one_step)
    by_slot = property(lambda self: self.of.by_slot)
    agreed = property(lambda self: self.of.agreed)
    updates_per_batch = property(lambda self: self.of.updates_per_batch)
    batchnorm_in_attack = property(lambda self: self.of.batchnorm_in_attack)
    linf_alone = property(lambda self: self.of.linf_alone)
    reads_weights = property(lambda self: True)

    def resolve(self, epsilon: float) -> None:
        if isinstance(self.of, Awp):
            raise ValueError("method.of is awp again: name the method that it is to be around")
        self.of.resolve(epsilon)
        self.gamma = (0.005 if self.of.name == "trades" else 0.01) if self.gamma is None else self.gamma

    def check(self, model: nn.Module, x: Tensor) -> None:
        self.of.check(model, x)

    def state(self, shapes: Shapes) -> dict[str, Tensor]:
        return self.of.state(shapes)

    def step(self, learner: Learner, batch: Inputs, threat: Threat, scale: Scale, state: dict[str, Tensor]) -> None:
        gamma = self.gamma * (learner.epoch() >= self.begin * learner.epochs)
        usual, learner.around_update = learner.around_update, partial(moved_weights, gamma=gamma)
        try:
            self.of.step(learner, batch, threat, scale, state)
        finally:
            learner.around_update = usual

    def describe(self) -> str:
        return f"awp, gamma {self.gamma:g}, of {self.of.describe()}"
