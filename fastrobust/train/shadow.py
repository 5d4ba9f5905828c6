"""Half-precision weights for the passes, fp32 masters for the updates, all in flat buffers: autocast has nothing left to
cast, and an SGD update with its loss scale is a few kernels, whatever the number of layers.

The model's parameters stay fp32 and keep their names: they are views into the flat masters, and the optimiser's
momentum into another flat buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastrobust.models.fused import have_kernels
from fastrobust.runtime.errors import ConfigError

ALIGNED = 128  # elements: every weight begins at a multiple of 256 bytes in half precision, as the allocator's do


class Shadow(nn.Module):
    """The weights of a model as its passes see them. Its parameters are the half-precision ones, which stand for those that
    autocast would cast: of convolutions and linear layers. All others are the model's own.

    optimizer: torch's SGD of this model, with its state; it is not stepped, `update` takes its place."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.SGD, dtype: torch.dtype):
        super().__init__()
        self.model, self.momentum = [model], optimizer.param_groups[0]["momentum"]  # a list: not a part of this module
        names = {p: name for name, p in model.named_parameters()}
        cast = {
            p for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear) for p in m._parameters.values()
        }
        groups = [(p, group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
        halved = [p for p, _ in groups if p in cast]
        self.full = [p for p, _ in groups if p not in cast]
        decays = dict(groups)
        order = halved + self.full
        starts, total, decayed = [], 0, []
        for p in order:
            starts.append(total)
            total += -(-p.numel() // ALIGNED) * ALIGNED
            if not decayed or decayed[-1][1] != decays[p]:
                decayed.append([total, decays[p]])
            decayed[-1][0] = total
        self.decays = [tuple(part) for part in decayed]  # (end, weight decay) of each part with one weight decay
        self.cut = ([*starts, total])[len(halved)]  # where the halved weights end

        def flat(size: int, kind: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(size, dtype=kind, device=order[0].device)

        def views(buffer: Tensor, parameters: list, offset: int = 0) -> list[Tensor]:
            place = dict(zip(order, starts, strict=True))
            return [buffer.as_strided(p.shape, p.stride(), place[p] - offset) for p in parameters]

        self.master, self.moment = flat(total), flat(total if self.momentum else 0)
        self.half, self.half_gradient = flat(self.cut, dtype), flat(self.cut, dtype)
        self.full_gradient, self.found = flat(total - self.cut), flat(1)
        self.gradients = views(self.half_gradient, halved) + views(self.full_gradient, self.full, self.cut)
        with torch.no_grad():
            for p, mine in zip(order, views(self.master, order), strict=True):
                p.data = mine.copy_(p)
            if self.momentum:
                for p, mine in zip(order, views(self.moment, order), strict=True):
                    optimizer.state[p]["momentum_buffer"] = mine.copy_(optimizer.state[p]["momentum_buffer"])
        self.halves = nn.ParameterList(nn.Parameter(view) for view in views(self.half, halved))
        self.names = {names[p]: half for p, half in zip(halved, self.halves, strict=True)}
        self.kernels = have_kernels(order[0].device)
        self.refresh()

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.model[0], self.names, (x,))

    def refresh(self) -> None:
        """After the masters were written from outside."""
        self.half.copy_(self.master[: self.cut])

    def differentiated(self) -> list[Tensor]:
        """What the loss of an update is differentiated with respect to; `update` takes the gradients in this order."""
        return [*self.halves, *self.full]

    def update(self, gradients: list[Tensor | None], lr: Tensor, scaler: torch.amp.GradScaler) -> None:
        """An SGD step by the gradients of the scaled loss, and a step of the loss scale: those of torch's optimiser and
        GradScaler. If a gradient is not finite only the scale moves."""
        if any(g is None for g in gradients):
            raise ConfigError("engine: fused needs a model whose weights all take part in the loss; use cuda_graph or eager")
        count = len(self.halves)
        for kind in (slice(count), slice(count, None)):  # one kernel for tensors of one kind
            if self.gradients[kind]:
                torch._foreach_copy_(self.gradients[kind], gradients[kind])
        scale, tracker = (scaler._scale, scaler._growth_tracker) if scaler.is_enabled() else (None, None)
        with torch.cuda.device_of(self.master):
            (self._by_kernels if self.kernels else self._by_torch)(lr, scale)
        if scale is not None:
            rates = scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()
            torch._amp_update_scale_(scale, tracker, self.found, *rates)

    def _by_torch(self, lr: Tensor, scale: Tensor | None) -> None:
        gradient = torch.cat([self.half_gradient.float(), self.full_gradient])
        if scale is not None:
            torch._amp_foreach_non_finite_check_and_unscale_([gradient], self.found.zero_(), torch.ones_like(scale))
        begin, found = 0, None if scale is None else self.found
        for end, decay in self.decays:
            part = slice(begin, end)
            torch._fused_sgd_(
                [self.master[part]],
                [gradient[part]],
                [self.moment[part]] if self.momentum else [],
                weight_decay=decay,
                momentum=self.momentum,
                lr=lr,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                grad_scale=scale,
                found_inf=found,
            )
            begin = end
        self.refresh()

    def _by_kernels(self, lr: Tensor, scale: Tensor | None) -> None:
        from fastrobust.train import update_kernels

        if scale is not None:
            update_kernels.check(self.half_gradient, self.full_gradient, self.found.zero_())
        begin = 0
        for end, decay in self.decays:
            buffers = self.half_gradient, self.full_gradient, self.master, self.moment, self.half
            update_kernels.sgd(*buffers, begin, end, decay, self.momentum, lr, scale, self.found)
            begin = end
