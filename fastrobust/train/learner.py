"""A model that is being trained: its gradient with respect to the input, and its weight updates.

Everything that changes from step to step (weights, optimiser moments, learning rate, loss scale, running sums) is a
tensor on the device that is written in place, so that nothing waits for the host and a step can be replayed as a graph.
"""

from __future__ import annotations

import contextlib
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust.attack.gradient import frozen
from fastrobust.runtime import cuda_graph
from fastrobust.train import interval_bounds

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Learner:
    """Args: model on its device; optimizer, a config section; lr_table, the learning rate of every update of the run.

    With precision `fp16` the losses of attack and update are multiplied by a dynamic loss scale before they are
    differentiated: input gradients of confident examples are far below fp16's smallest number, and their signs would
    be lost. The sign of a gradient does not depend on the scale. Weights and sums are fp32 in every precision.
    On a GPU convolutions in `fp32` round their inputs to TF32, as torch lets them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer,
        lr_table: Tensor,
        *,
        precision: str = "fp32",
        batchnorm_in_attack: str = "train",
    ):
        self.model = model
        self.device = next(model.parameters()).device
        self.batchnorm_in_attack = batchnorm_in_attack
        self.autocast = torch.autocast(self.device.type, DTYPES[precision], enabled=precision != "fp32")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.lr_table = lr_table.to(self.device)
        self.lr = torch.zeros((), device=self.device)
        self.updates = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.seen = torch.zeros((), dtype=torch.int64, device=self.device)
        self.optimizer = optimizer.build(model, self.lr)
        self.shared: nn.Module | None = None

    def share_gradients(self) -> None:
        """From here on weight gradients are averaged over all processes, while the backward pass of an update is still
        going on. Attack passes use the bare model and exchange nothing."""
        ddp = nn.parallel.DistributedDataParallel
        no_buffers = "forward_sync_buffers" if "forward_sync_buffers" in signature(ddp).parameters else "broadcast_buffers"
        on_stream = cuda_graph.on_stream(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with on_stream:  # that of the captures: gradients are accumulated on the stream on which this is built
            self.shared = ddp(_Forward(self), gradient_as_bucket_view=True, **{no_buffers: False})  # torch 2.13 renamed it
        self.shared._set_ddp_runtime_logging_sample_rate(2**31 - 1)  # its timing of every 100th pass would end a capture

    def forward(self, x: Tensor) -> Tensor:
        with self.autocast:
            return self.model(x).float()

    def input_gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the loss at x with respect to x (up to a positive factor), and which examples are classified
        correctly there (bool, N). Weights get no gradient."""
        if self.batchnorm_in_attack == "eval":
            self.model.eval()
        try:
            with frozen(self.model):
                x = x.detach().requires_grad_()
                logits = self.forward(x)
                loss = self.scaler.scale(F.cross_entropy(logits, y))
                (gradient,) = torch.autograd.grad(loss, x)
        finally:
            self.model.train()
        return gradient, logits.detach().argmax(1) == y

    def update(self, x: Tensor, y: Tensor, box: tuple[Tensor, Tensor] | None = None, ibp_weight: float = 0.0) -> None:
        """One optimiser step on the loss at x; adds to the running sums. With a box (lower and upper pixels) a part
        `ibp_weight` of the loss is its bound over the box, in fp32 whatever the precision."""
        logits = self._forward_of_update(x.detach())
        bound = None if box is None else F.cross_entropy(interval_bounds.worst_differences(self.model, *box, y), y)
        self._step(logits, y, bound, ibp_weight)

    def update_with_input_gradient(self, x: Tensor, y: Tensor) -> Tensor:
        """`update`, and the gradient with respect to x out of the same backward pass."""
        x = x.detach().requires_grad_()
        self._step(self._forward_of_update(x), y)
        return x.grad

    def _forward_of_update(self, x: Tensor) -> Tensor:
        return self.forward(x) if self.shared is None else self.shared(x)

    def _step(self, logits: Tensor, y: Tensor, bound: Tensor | None = None, ibp_weight: float = 0.0) -> None:
        loss = F.cross_entropy(logits, y)
        if bound is not None:
            loss = torch.lerp(loss, bound, ibp_weight)
        self.lr.copy_(self.now(self.lr_table))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.updates.add_(1)
        self.loss_sum.add_(loss.detach() * len(y))
        self.correct.add_((logits.detach().argmax(1) == y).sum())
        self.seen.add_(len(y))

    def now(self, table: Tensor) -> Tensor:
        """The entry of a table over updates that belongs to the next one (shape [])."""
        return table.index_select(0, self.updates.clamp(max=len(table) - 1))[0]

    def read_sums(self) -> tuple[float, int, int]:
        """(sum of losses, correct answers, examples) since the last reset. Waits for the device."""
        return self.loss_sum.item(), self.correct.item(), self.seen.item()

    def reset_sums(self) -> None:
        for total in (self.loss_sum, self.correct, self.seen):
            total.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, by name, without copying."""
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for i, p in enumerate(self._parameters()):
            tensors |= {f"optimizer.{i}.{name}": t for name, t in self.optimizer.state[p].items()}
        tensors |= {f"sums.{name}": getattr(self, name) for name in ("updates", "loss_sum", "correct", "seen")}
        return tensors

    def state_dict(self) -> dict:
        state = {name: t.detach().clone() for name, t in self.tensors().items()}
        return {"tensors": state, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Writes in place. Raises KeyError or RuntimeError when names or shapes do not match."""
        mine = self.tensors()
        if mine.keys() != state["tensors"].keys():
            odd = sorted(mine.keys() ^ state["tensors"].keys())
            raise KeyError(f"the stored state does not fit this model and optimiser: {odd[:3]}")
        for name, t in mine.items():
            if t.shape != state["tensors"][name].shape:
                raise RuntimeError(f"{name} has shape {tuple(t.shape)}, stored {tuple(state['tensors'][name].shape)}")
        with torch.no_grad():
            for name, t in mine.items():
                t.copy_(state["tensors"][name])
        if self.scaler.is_enabled():
            self.scaler.scale(torch.zeros((), device=self.device))  # the scale exists from its first use on
            self.scaler.load_state_dict(state["scaler"])

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


class _Forward(nn.Module):
    """The forward pass of a learner, compiled or not, as the module that DistributedDataParallel wraps."""

    def __init__(self, learner: Learner):
        super().__init__()
        self.model, self.run = learner.model, lambda x: learner.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)
