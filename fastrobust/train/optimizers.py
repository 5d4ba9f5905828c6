"""Optimisers: each is a section of a config that builds a torch optimiser whose step is one fused call."""

from abc import ABC, abstractmethod
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from fastrobust.config.fields import NonNegative, Number, Section


class Optimizer(Section, ABC):
    """The base of all optimisers. One of one's own derives from it, is named `package.module:Class` in a config, and gives
    `make` and `kept`."""

    name: str
    weight_decay: NonNegative = 0.0
    decay_batchnorm: bool = True

    @abstractmethod
    def make(self, groups: list[dict], lr: Tensor) -> torch.optim.Optimizer:
        """The optimiser of parameter groups that reads its learning rate from the tensor lr (shape [])."""

    def kept(self) -> tuple[str, ...]:
        """The names of the tensors that it keeps for each parameter: all like the parameter, but `step`, a number."""
        return ()

    def build(self, model: nn.Module, lr: Tensor) -> torch.optim.Optimizer:
        """Its state exists from the start (zero moments: what the first step would have made), so that every step is the
        same and can be captured."""
        optimizer = self.make(parameter_groups(model, self.weight_decay, self.decay_batchnorm), lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
            for p in group["params"]:
                optimizer.state[p] = {name: torch.zeros_like(p) for name in self.kept() if name != "step"}
                if "step" in self.kept():
                    optimizer.state[p]["step"] = torch.zeros((), device=p.device)
        return optimizer


def parameter_groups(model: nn.Module, weight_decay: float, decay_batchnorm: bool) -> list[dict]:
    """All parameters that are trained; those of BatchNorm without weight decay unless `decay_batchnorm`."""
    batchnorm = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    spared = set() if decay_batchnorm else {id(p) for m in batchnorm for p in m.parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if id(p) not in spared], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in spared], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Sgd(Optimizer):
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 5e-4

    def make(self, groups: list[dict], lr: Tensor) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=lr, momentum=self.momentum, fused=True)

    def kept(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()


class Adam(Optimizer):
    def make(self, groups: list[dict], lr: Tensor) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups, lr=lr, fused=True, capturable=lr.device.type == "cuda")

    def kept(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "step")
