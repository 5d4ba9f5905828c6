"""Averaged weights: an exponential moving average of the weights of all updates, which is more robust than the last ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Average:
    """After update t (from 0): mean <- tau mean + (1 - tau) weights, tau = min(decay, (1 + t) / (10 + t)), so that the first
    weights are soon forgotten. BatchNorm's running averages are averaged as the weights are. `tensors`: the means, by the
    names of the model's state."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        state = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
        self.tensors = {name: t.detach().clone() for name, t in state.items()}

    def buffers(self) -> dict[str, Tensor]:
        """Those of the means that belong to no weight: BatchNorm's."""
        weights = dict(self.model.named_parameters())
        return {name: t for name, t in self.tensors.items() if name not in weights}

    def update(self, updates: Tensor) -> None:
        """Take up the weights as they are. updates: how many there were before the last one (int64, 1)."""
        every = {"remove_duplicate": False}  # and no state, whose taking counts BatchNorm's batches: this is within a step
        state = dict(self.model.named_parameters(**every)) | dict(self.model.named_buffers(**every))
        now, means = [state[name].detach() for name in self.tensors], list(self.tensors.values())
        weight = 1 - ((1 + updates) / (10 + updates)).clamp(max=self.decay)
        change = torch._foreach_sub(now, means)
        torch._foreach_mul_(change, weight[0])
        torch._foreach_add_(means, change)

    def swap(self) -> None:
        """Exchange the model's weights and the means, in place."""
        state = self.model.state_dict()
        with torch.no_grad():
            for name, mean in self.tensors.items():
                kept = state[name].clone()
                state[name].copy_(mean)
                mean.copy_(kept)
