"""Optimisers: each is a section of a config that builds a torch optimiser whose step is one fused call."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from fastrobust.config.fields import NonNegative, Number, Section, key
from fastrobust.runtime.errors import ConfigError


class Optimizer(Section, ABC):
    """The base of all optimisers. One of one's own derives from it, is named `package.module:Class` in a config, and gives
    `make` and `kept`."""

    name: str
    weight_decay: NonNegative = key("L2 penalty", 0.0)
    decay_batchnorm: bool = key("`false`: no weight decay on BatchNorm's parameters", True)
    rates: dict[str, NonNegative] | None = key(
        'for fine-tuning: `{"": 0.1, linear: 1}` trains all with a tenth of the rate and the last layer with the whole; a '
        "factor of 0 freezes. Of several prefixes the longest counts",
        None,
        "none",
        values="a section: start of parameters' names → factor",
    )

    @abstractmethod
    def make(self, groups: list[dict], lr: Tensor) -> torch.optim.Optimizer:
        """The optimiser of parameter groups that reads its learning rate from the tensor lr (shape [])."""

    def kept(self) -> tuple[str, ...]:
        """The names of the tensors that it keeps for each parameter: all like the parameter, but `step`, a number."""
        return ()

    def groups(self, model: nn.Module) -> list[dict]:
        """The parameters that are trained, by weight decay and by the factor of their rate: those of BatchNorm are without
        weight decay unless `decay_batchnorm`; those under a prefix in `rates` have its factor, and with a factor of 0 are
        not trained. Of several prefixes the longest counts. Raises ConfigError."""
        network = getattr(model, "network", model)
        batchnorm = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        spared = set() if self.decay_batchnorm else {id(p) for m in batchnorm for p in m.parameters()}
        found: dict[tuple[float, float], list[nn.Parameter]] = {}
        rates, used = self.rates or {}, set()
        for name, p in network.named_parameters():
            prefix = max((prefix for prefix in rates if name.startswith(prefix)), key=len, default=None)
            used.add(prefix)
            factor = rates.get(prefix, 1.0)
            p.requires_grad_(p.requires_grad and factor > 0)
            if p.requires_grad:
                found.setdefault((0.0 if id(p) in spared else self.weight_decay, factor), []).append(p)
        if unknown := [prefix for prefix in rates if prefix not in used]:
            names = ", ".join(dict.fromkeys(name.split(".")[0] for name, _ in network.named_parameters()))
            raise ConfigError(f"optimizer.rates: no parameter's name starts with '{unknown[0]}'; they start with: {names}")
        if not found:
            cause = "optimizer.rates freezes all parameters" if rates else "no parameter of the model requires a gradient"
            raise ConfigError(f"{cause}: nothing is left to train")
        order = sorted(found, key=lambda key: (key[1] != 1, key[0] == 0.0 and self.weight_decay > 0, key[1]))
        return [{"params": found[key], "weight_decay": key[0], "factor": key[1]} for key in order]

    def build(self, model: nn.Module, lr: Tensor) -> torch.optim.Optimizer:
        """Its state exists from the start (zero moments: what the first step would have made), so that every step is the
        same and can be captured. A group whose rate is not lr itself has a tensor of its own for it: `set_rates`. Raises
        ConfigError."""
        optimizer = self.make(self.groups(model), lr)
        for group in optimizer.param_groups:
            group["lr"] = lr if group["factor"] == 1 else lr.clone()
            for p in group["params"]:
                optimizer.state[p] = {name: torch.zeros_like(p) for name in self.kept() if name != "step"}
                if "step" in self.kept():
                    optimizer.state[p]["step"] = torch.zeros((), device=p.device)
        return optimizer


def set_rates(optimizer: torch.optim.Optimizer, lr: Tensor) -> None:
    """Give each group its share of the learning rate. Does not wait for the device."""
    for group in optimizer.param_groups:
        if group["factor"] != 1:
            group["lr"].copy_(lr * group["factor"])


class Sgd(Optimizer):
    momentum: Number = key("momentum; no schedule changes it", 0.9, ge=0, lt=1)
    weight_decay: NonNegative = key("L2 penalty", 5e-4)

    def make(self, groups: list[dict], lr: Tensor) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=lr, momentum=self.momentum, fused=True)

    def kept(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()


class Adam(Optimizer):
    """Weight decay is part of the gradient."""

    def make(self, groups: list[dict], lr: Tensor) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups, lr=lr, fused=True, capturable=lr.device.type == "cuda")

    def kept(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "step")


class AdamW(Adam):
    """Weight decay is decoupled from the gradient (Loshchilov & Hutter, 2019)."""

    weight_decay: NonNegative = key("decoupled from the gradient", 0.01)

    def make(self, groups: list[dict], lr: Tensor) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=lr, fused=True, capturable=lr.device.type == "cuda")
