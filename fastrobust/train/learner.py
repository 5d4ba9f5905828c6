"""A model that is being trained: its gradient with respect to the input, and its weight updates.

Everything that changes from step to step (weights, optimiser moments, learning rate, loss scale, running sums) is a
tensor on the device that is written in place, so that nothing waits for the host and a step can be replayed as a graph.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from inspect import signature
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn
from torch.func import functional_call

from fastrobust.attack.gradient import frozen
from fastrobust.models import fused
from fastrobust.models.products import Products, have_amx
from fastrobust.models.winograd import Filtering
from fastrobust.runtime import cuda_graph
from fastrobust.train.alignment import EVERY, UNKNOWN, alignment
from fastrobust.train.averaging import Average
from fastrobust.train.losses import LOSSES
from fastrobust.train.optimizers import set_rates
from fastrobust.train.shadow import Shadow

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits N x classes, labels N) -> the loss of the batch
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def right(logits: Tensor, y: Tensor) -> Tensor:
    """Which rows of logits name their label, or of shares of the classes the largest (bool, N)."""
    return logits.argmax(1) == (y if y.dim() == 1 else y.argmax(1))


class Part(NamedTuple):
    """Which part of a batch an update is about: the first one, the last one (which moves the weights), its share of the
    images."""

    first: bool = True
    last: bool = True
    share: float = 1.0


class Learner:
    """Args: model on its device; optimizer, a config section; lr_table, the learning rate of every update of the run;
    epoch_table, when each takes place, in epochs; averaging, the decay of averaged weights; kernels, whether the model
    uses our own; reads_weights, whether the method reads the model's weights itself; in_parts, whether some updates are
    made of the gradients of several parts of a batch (`part`); watched, whether the alignment of the attack's gradients
    is noted (`alignment.py`); filtering, whether convolutions are those of `models/winograd.py`; numba, whether BatchNorm
    with ReLU is that of `models/norm_numba.py`, and in bf16 small convolutions those of `models/products.py`; the others as
    in a config.

    With precision `fp16` the losses of attack and update are multiplied by a dynamic loss scale before they are
    differentiated: input gradients of confident examples are far below fp16's smallest number, and their signs would
    be lost. The sign of a gradient does not depend on the scale. Weights and sums are fp32 in every precision.
    On a GPU convolutions in `fp32` round their inputs to TF32, as torch lets them.

    kernels: BatchNorm and ReLU run as Triton's kernels where there are any; in half precisions with SGD the passes use
    half-precision weights beside the fp32 ones (`shadow.py`), and an update is a few kernels.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer,
        lr_table: Tensor,
        *,
        epoch_table: Tensor | None = None,
        precision: str = "fp32",
        batchnorm_in_attack: str = "train",
        loss: str = "cross_entropy",
        label_smoothing: float = 0.0,
        clip_gradients: float | None = None,
        averaging: float | None = None,
        kernels: bool = False,
        reads_weights: bool = False,
        in_parts: bool = False,
        watched: bool = False,
        filtering: bool = False,
        numba: bool = False,
    ):
        self.model, self.part = model, Part()
        amx = numba and precision == "bf16" and have_amx()
        self.convolutions = Filtering if filtering else Products if amx else contextlib.nullcontext  # those of a pass
        self.moved: dict[str, Tensor] | None = None  # tensors that stand in for the model's own in the forward pass
        self.around_update = lambda learner, x, y, loss: contextlib.nullcontext()  # a context in which updates are made
        self.device = next(model.parameters()).device
        self.batchnorm_in_attack = batchnorm_in_attack
        self.autocast = torch.autocast(self.device.type, DTYPES[precision], enabled=precision != "fp32")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.scaler.scale(torch.zeros((), device=self.device))  # the scale exists from its first use on
        self.one = torch.ones((), device=self.device)
        self.lr_table = lr_table.to(self.device)
        self.epoch_table = (torch.zeros(1) if epoch_table is None else epoch_table).to(self.device)
        self.epochs = max(1, math.ceil(self.epoch_table[-1]))
        self.lr = torch.zeros((), device=self.device)
        self.updates = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.seen = torch.zeros((), dtype=torch.int64, device=self.device)
        self.alignments = torch.full((len(lr_table) if watched else 0,), UNKNOWN, device=self.device)  # by update
        self.of_attack: Tensor | None = None  # the gradient of the attack whose update comes next
        self.aligned = False  # whether there has been an alignment to note
        self.made = 0  # updates, as the host counts them
        self.looks: bool | None = None  # whether the next update gives its alignment, if that is not to go by `due`
        self.optimizer = optimizer.build(model, self.lr)
        self.shared: nn.Module | None = None
        self.of_logits, self.label_smoothing, self.clip_gradients = LOSSES[loss], label_smoothing, clip_gradients
        self.average = None if averaging is None else Average(model, averaging)
        self.shadow: Shadow | None = None
        if kernels or numba or self.device.type == "cuda":
            fused.prepare(model, kernels, numba)
        plain = isinstance(self.optimizer, torch.optim.SGD) and clip_gradients is None
        plain = plain and not reads_weights and not in_parts
        if kernels and precision != "fp32" and plain and all(g["factor"] == 1 for g in self.optimizer.param_groups):
            self.shadow = Shadow(model, self.optimizer, DTYPES[precision])

    def share_gradients(self) -> None:
        """From here on weight gradients are averaged over all processes, while the backward pass of an update is still
        going on. Attack passes use the bare model and exchange nothing."""
        self.shadow = None  # gradients are exchanged in the fp32 weights' own buckets
        ddp = nn.parallel.DistributedDataParallel
        no_buffers = "forward_sync_buffers" if "forward_sync_buffers" in signature(ddp).parameters else "broadcast_buffers"
        on_stream = cuda_graph.on_stream(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with on_stream:  # that of the captures: gradients are accumulated on the stream on which this is built
            self.shared = ddp(_Forward(self), gradient_as_bucket_view=True, **{no_buffers: False})  # torch 2.13 renamed it
        self.shared._set_ddp_runtime_logging_sample_rate(2**31 - 1)  # its timing of every 100th pass would end a capture

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        """The logits at x. twice: they can be differentiated twice."""
        with self.autocast, contextlib.nullcontext() if twice else self.convolutions():
            if self.moved is not None:
                return functional_call(self.model, self.moved, x).float()
            return (self.shadow or self.model)(x).float()

    def scale_of(self, loss: Tensor) -> Tensor:
        """What a loss is differentiated with, as `grad_outputs`: its gradients are those of the scaled loss."""
        return (self.scaler._scale if self.scaler.is_enabled() else self.one).to(loss.dtype)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a batch, of attack and update, where a method has none of its own."""
        return self.of_logits(logits, y, label_smoothing=self.label_smoothing)

    def input_gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the loss at x with respect to x (up to a positive factor), and which examples are classified
        correctly there (bool, N). Weights get no gradient."""
        gradient, logits = self.attack_gradient(x, y)
        return gradient, right(logits, y)

    def attack_gradient(
        self,
        x: Tensor,
        y: Tensor,
        loss: Loss | None = None,
        *,
        keep: bool = False,
        twice: bool = False,
        mode: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The gradient of a loss at x with respect to x (up to a positive factor), and the logits there. Weights get no
        gradient. With `keep` the logits can be a part of the next update's loss, whose backward pass goes through them too;
        with `twice` the gradient can. mode: `train` or `eval` for BatchNorm, if not that of all attacks."""
        x, later = x.detach().requires_grad_(), keep or twice
        nothing, held = contextlib.nullcontext(), twice or (keep and (mode or self.batchnorm_in_attack) == "eval")
        plain = fused.without_kernels(self.model) if held else nothing
        with self._attacking(mode), plain, nothing if later else self._frozen():
            logits = self.forward(x, twice)
            found = (loss or self.loss)(logits, y)
            (gradient,) = torch.autograd.grad(found, x, self.scale_of(found), retain_graph=later, create_graph=twice)
        looks = self.due() if self.looks is None else self.looks
        if looks and self.part.last and mode is None and not twice:
            self.of_attack = gradient
        return gradient, logits if keep else logits.detach()

    def attack_logits(self, x: Tensor) -> Tensor:
        """The logits at x as an attack sees them, without any gradient."""
        with self._attacking(), torch.no_grad():
            return self.forward(x)

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        with frozen(self.model), frozen(self.shadow or self.model):
            yield

    @contextlib.contextmanager
    def _attacking(self, mode: str | None = None) -> Iterator[None]:
        if (mode or self.batchnorm_in_attack) == "eval":
            self.model.eval()
        try:
            yield
        finally:
            self.model.train()

    def update(self, x: Tensor, y: Tensor, loss: Loss | None = None) -> None:
        """One optimiser step on the loss of the logits at x; adds to the running sums."""
        if self.of_attack is not None:
            self.update_with_input_gradient(x, y, loss)
            return
        loss = loss or self.loss
        with self.around_update(self, x, y, loss), self._exchanging():
            self._step(self._forward_of_update(x.detach()), y, loss)

    def update_with_input_gradient(self, x: Tensor, y: Tensor, loss: Loss | None = None) -> Tensor:
        """`update`, and the gradient with respect to x out of the same backward pass."""
        x = x.detach().requires_grad_()
        loss = loss or self.loss
        with self.around_update(self, x, y, loss):
            self._step(self._forward_of_update(x), y, loss, x)
        if self.of_attack is not None:
            last = (self.updates - 1).clamp(max=len(self.alignments) - 1)
            self.alignments.index_copy_(0, last, alignment(self.of_attack, x.grad)[None])
            self.of_attack, self.aligned = None, True
        return x.grad

    def mean(self, t: Tensor) -> Tensor:
        """A tensor's mean over the processes, each of which has a part of the batch."""
        if self.shared is None:
            return t
        total = t.clone()
        torch.distributed.all_reduce(total)
        return total / torch.distributed.get_world_size()

    def gather(self, t: Tensor) -> Tensor:
        """The rows of all processes, in the order of the batch."""
        if self.shared is None:
            return t
        parts = [torch.empty_like(t) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, t.contiguous())
        return torch.cat(parts)

    def epoch(self) -> Tensor:
        """When the next update takes place, in epochs since the start (shape [])."""
        return self.now(self.epoch_table)

    def due(self) -> bool:
        """Whether the next update (of its parts, the last) gives its alignment too. It costs a pass through the first layer:
        a sixth of a step of a network of two convolutions. So most do without."""
        return len(self.alignments) > 0 and self.made % EVERY == 0

    def _exchanging(self) -> contextlib.AbstractContextManager:
        """Only the backward pass of the last part exchanges gradients with other processes: those of all parts."""
        return contextlib.nullcontext() if self.part.last or self.shared is None else self.shared.no_sync()

    def _forward_of_update(self, x: Tensor) -> Tensor:
        return self.forward(x) if self.shared is None else self.shared(x)

    def _step(self, logits: Tensor, y: Tensor, of_logits: Loss, x: Tensor | None = None) -> None:
        loss = of_logits(logits, y)
        self.lr.copy_(self.now(self.lr_table))
        if self.shadow is None:
            set_rates(self.optimizer, self.lr)
            if self.part.first:
                self.optimizer.zero_grad(set_to_none=True)
            scale = self.scale_of(loss)
            loss.backward(scale if self.part.share == 1 else scale * self.part.share)
            if self.part.last:
                self._move()
        else:
            wanted = self.shadow.differentiated() + ([] if x is None else [x])
            gradients = list(torch.autograd.grad(loss, wanted, self.scale_of(loss), allow_unused=True))
            if x is not None:
                x.grad = gradients.pop()
            self.shadow.update(gradients, self.lr, self.scaler)
        last = self.part.last
        if last:
            self.made += 1
            if self.average is not None:
                self.average.update(self.updates)
        torch._foreach_add_([self.updates, self.seen], [int(last), len(y)])
        self.loss_sum.add_(loss.detach(), alpha=len(y))
        self.correct.add_(right(logits.detach(), y).sum())

    def _move(self) -> None:
        """One step of the optimiser along the gradients that are there."""
        if self.clip_gradients is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._parameters(), self.clip_gradients)
        self.scaler.step(self.optimizer)
        self.scaler.update()

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
        if self.average is not None:
            tensors |= {f"averaged.{name}": t for name, t in self.average.tensors.items()}
        sums = ("updates", "loss_sum", "correct", "seen", "alignments")
        tensors |= {f"sums.{name}": getattr(self, name) for name in sums}
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
            self.refresh()
        self.made = int(self.updates)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])

    def refresh(self) -> None:
        """After the model's weights were written from outside."""
        if self.shadow is not None:
            self.shadow.refresh()

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


class _Forward(nn.Module):
    """The forward pass of a learner, compiled or not, as the module that DistributedDataParallel wraps."""

    def __init__(self, learner: Learner):
        super().__init__()
        self.model, self.run = learner.model, lambda x: learner.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)
