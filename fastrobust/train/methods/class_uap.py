"""FGSM-CUAP (Pan et al., 2024): FGSM-UAP with one universal perturbation for each class."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastrobust.attack.threat import Threat
from fastrobust.train.methods.base import Inputs, Learner, Scale, Shapes, signs
from fastrobust.train.methods.fgsm_uap import FgsmUap


class ClassUap(FgsmUap):
    """u and m have a row for each class. A class that has no image in the batch stays as it is."""

    soft_labels = property(lambda self: False)  # u has a row for each class
    name: Literal["class_uap"]

    def state(self, shapes: Shapes) -> dict[str, Tensor]:
        u = signs(shapes, shapes.classes)
        return {"u": u, "m": torch.zeros_like(u)}

    def step(self, learner: Learner, batch: Inputs, threat: Threat, scale: Scale, state: dict[str, Tensor]) -> None:
        u, m = state["u"], state["m"]
        gradient = self.train(learner, batch, threat.scaled(scale), u[batch.y] * (self.alpha * scale))
        of_class = (batch.y == torch.arange(len(u), device=u.device)[:, None]).float()  # classes x N
        count = learner.mean(of_class.sum(1))[:, None, None, None]
        mean = learner.mean((of_class @ gradient.flatten(1)).view_as(m)) / count.clamp(min=1e-3)
        m.copy_(torch.where(count > 0, self.momentum * m + mean, m))
        u.add_(torch.where(count > 0, m.sign(), 0.0)).clamp_(-1, 1)
