"""An optimiser of your own: torch's AdamW, with what it keeps for every parameter."""

import torch

from fastrobust.config.fields import Positive
from fastrobust.train.optimizers import Optimizer


class AdamW(Optimizer):
    weight_decay: Positive = 0.01
    beta: Positive = 0.9

    def make(self, groups, lr):
        options = {"betas": (self.beta, 0.999), "fused": True, "capturable": lr.device.type == "cuda"}
        return torch.optim.AdamW(groups, lr=lr, **options)

    def kept(self):
        return ("exp_avg", "exp_avg_sq", "step")
