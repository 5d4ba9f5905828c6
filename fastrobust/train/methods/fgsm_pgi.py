"""FGSM-PGI (Jia et al., 2022, with the momentum of all epochs, MEP): FGSM that starts where it ended for the same image."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust.attack.threat import Threat
from fastrobust.config.fields import Count, key
from fastrobust.runtime.errors import ConfigError
from fastrobust.runtime.limits import available_memory
from fastrobust.train.learner import Loss
from fastrobust.train.methods.base import Attacked, Inputs, Learner, Scale, Shapes, per_pixel, smoothed
from fastrobust.train.methods.fgsm_uap import Consistency, Momentum, Smoothing, StopGradient

LARGEST = 60000.0  # that fp16 holds


def fgsm_pgi(
    learner: Learner,
    x: Tensor,
    y: Tensor,
    delta: Tensor,
    m: Tensor,
    *,
    threat: Threat,
    momentum: float,
    loss: Loss,
    weight: float,
    stop_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """FGSM from delta, the images' own perturbations, and a loss that also asks for the same logits at the start and at the
    end. Returns the next delta, which follows m, the mean of the images' gradients over the epochs, and m."""
    gradient, at_start = learner.attack_gradient(x + threat.clip(delta, x), y, loss, keep=not stop_gradient)
    end = threat.project(threat.step(delta, gradient, threat.radius), x)
    learner.update(x + end, y, lambda logits, y: loss(logits, y) + weight * F.mse_loss(logits, at_start))
    m = momentum * m + per_pixel(gradient, learner)
    return threat.project(threat.step(delta, m, threat.radius), x), m


class FgsmPgi(Attacked):
    """State, fp16: for every image delta, in units of epsilon, and m; `round`, in which both were written: after so many
    epochs as `reset` says an image starts anew. As published, they do not move with crop and flip."""

    agreed: ClassVar[tuple[str, ...]] = ("delta", "m", "round")
    linf_alone = property(lambda self: f"method {self.name}")
    name: Literal["fgsm_pgi"]
    reset: Count = key("epochs after which the kept perturbations start anew", 40)
    momentum: Momentum = 0.3
    consistency: Consistency = 10.0
    label_smoothing: Smoothing = 0.4
    stop_gradient: StopGradient = False

    def state(self, shapes: Shapes) -> dict[str, Tensor]:
        on_gpu, size = shapes.device.type == "cuda", (shapes.examples, *shapes.batch[1:])
        needed, free = 4 * math.prod(size), torch.cuda.mem_get_info(shapes.device)[0] if on_gpu else available_memory()
        if 2 * needed > free:
            raise ConfigError(
                f"method fgsm_pgi keeps 4 bytes for each pixel of each training image: {needed / 1e9:.3g} GB, and as much "
                f"again while a checkpoint is written; {free / 1e9:.3g} GB are free. fgsm_uap and liet keep few images"
            )
        zeros = lambda: torch.zeros(size, dtype=torch.float16, device=shapes.device)
        return {"delta": zeros(), "m": zeros(), "round": torch.full(size[:1], -1.0, device=shapes.device)}

    def step(self, learner: Learner, batch: Inputs, threat: Threat, scale: Scale, state: dict[str, Tensor]) -> None:
        threat, now = threat.scaled(scale), (learner.epoch() / self.reset).floor()
        known = (state["round"][batch.index] == now)[:, None, None, None]
        signs = (torch.rand_like(batch.x) - 0.5).sign()
        delta = torch.where(known, state["delta"][batch.index].float(), signs)
        m = torch.where(known, state["m"][batch.index].float(), 0.0)
        options = {"momentum": self.momentum, "weight": self.consistency, "stop_gradient": self.stop_gradient}
        options |= {"threat": threat, "loss": smoothed(self.label_smoothing)}
        delta, m = fgsm_pgi(learner, batch.x, batch.y, delta * threat.radius, m, **options)
        index = learner.gather(batch.index)
        keep = last_of_each(index)
        for name, new in (("delta", delta / threat.radius), ("m", m.clamp(-LARGEST, LARGEST))):
            state[name].index_copy_(0, index, learner.gather(new.half())[keep])
        state["round"].index_copy_(0, index, now.expand(len(index)))

    def describe(self) -> str:
        through = ", gradient stopped at the start" if self.stop_gradient else ""
        return f"fgsm_pgi, reset after {self.reset} epochs, consistency {self.consistency:g}{through}"


def last_of_each(index: Tensor) -> Tensor:
    """For each place in a batch the last place of the same image: a batch that joins two passes can hold one twice, and
    what is written must not depend on who writes last."""
    places = torch.arange(len(index), device=index.device)
    return torch.where(index[:, None] == index, places, -1).amax(1)
