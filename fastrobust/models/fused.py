"""BatchNorm followed by ReLU as one operation, with a residual sum before or after it, and where a model has them.

Models call `norm_relu`; as long as nothing else is asked for it is torch's operations. `prepare` makes the same model use
the kernels of `norm_kernels` and `pixel_kernels`, or on a CPU those of `norm_numba`, and counts BatchNorm's batches on the
host. Names of weights and buffers stay.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from functools import cache, partial
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust.models.norm_function import NUMBA, TRITON, NormRelu, kernels_of
from fastrobust.models.pixels import KernelNormalized, Normalized
from fastrobust.runtime import compiled
from fastrobust.runtime.errors import first_line

DTYPES = {None: (), TRITON: (torch.float16, torch.bfloat16, torch.float32), NUMBA: (torch.bfloat16, torch.float32)}


def trouble(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run there, or None: they run on a GPU, and anywhere in its interpreter, which shows
    numbers and no speed."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "they need a GPU"
    if importlib.util.find_spec("triton") is None:
        return "they need Triton, which is not installed"
    return _tried(device)


@cache
def _tried(device: torch.device) -> str | None:
    """What goes wrong with the first kernel: Triton needs a C compiler, for one."""
    try:
        from fastrobust.models.norm_kernels import norm_relu as kernel

        x, one = torch.zeros(2, 1, 2, 2, device=device), torch.ones(1, device=device)
        kernel(x, None, one, one, one.clone(), one.clone(), 0.1, 1e-5, True, False)
    except Exception as error:  # a compiler can raise anything
        return first_line(error)
    return None


def have_kernels(device: torch.device) -> bool:
    return trouble(device) is None


@cache
def trouble_with_numba() -> str | None:
    """Why there are no kernels for a CPU, or None."""
    return compiled.trouble(lambda: kernels_of(NUMBA))


class CountedNorm(nn.BatchNorm2d):
    """A BatchNorm2d that counts its batches on the host: `num_batches_tracked` is right in every state that is taken, and
    costs no kernel in a step (`prepare`). That tensor's attribute `unwritten`, a list of one number, is what it lacks. One
    that takes its place has no such attribute, and is counted in at once."""

    kernels: str | None = None  # the kind of device on which kernels are used
    kind: str | None = None  # whose: TRITON or NUMBA
    apart: bool = False  # whether the running averages that the backward pass holds are copies

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler puts the counting beside other work
            return super().forward(x)
        self.note()
        averages = self.running_mean, self.running_var
        used = [t.clone() for t in averages] if self.apart else averages
        y = F.batch_norm(x, *used, self.weight, self.bias, self.training, self.momentum, self.eps)
        if self.apart and self.training:
            torch._foreach_copy_(list(averages), used)
        return y

    def note(self) -> None:
        if self.training:
            batches = self.num_batches_tracked
            if hasattr(batches, "unwritten"):
                batches.unwritten[0] += 1
            else:
                batches.add_(1)

    def _save_to_state_dict(self, *arguments) -> None:
        waiting = getattr(self.num_batches_tracked, "unwritten", [0])
        if waiting[0] and not (self.weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.num_batches_tracked.add_(waiting[0])
            waiting[0] = 0
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments) -> None:
        getattr(self.num_batches_tracked, "unwritten", [0])[0] = 0
        super()._load_from_state_dict(*arguments)


class CountedNormRelu(CountedNorm):
    """The same with the ReLU that follows it."""

    def forward(self, x: Tensor) -> Tensor:
        return norm_relu(self, x)[1]


def norm_relu(norm: nn.Module, x: Tensor, add: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(z, relu(norm(z))) of z = x + add, or of z = x. x, add: N x C x H x W."""
    if _fits(norm, x, add):
        z, y = _kernels(norm, x, add, after=False)
        return (x if add is None else z), y
    return plain_norm_relu(partial(_plain, norm), x, add)


def plain_norm_relu(norm: nn.Module, x: Tensor, add: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(z, relu(norm(z))) of z = x + add, or of z = x, by torch's operations."""
    z = x if add is None else x + add
    return z, F.relu(norm(z))


def norm_silu(norm: nn.Module, x: Tensor, add: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(z, silu(norm(z))) of z = x + add, or of z = x. There is no kernel of it."""
    z = x if add is None else x + add
    return z, F.silu(norm(z))


def norm_add_relu(norm: nn.Module, x: Tensor, add: Tensor) -> Tensor:
    """relu(norm(x) + add)."""
    return _kernels(norm, x, add, after=True)[1] if _fits(norm, x, add, True) else F.relu(_plain(norm, x) + add)


def _plain(norm: nn.Module, x: Tensor) -> Tensor:
    return CountedNorm.forward(norm, x) if isinstance(norm, CountedNorm) else norm(x)


def _fits(norm: nn.Module, x: Tensor, add: Tensor | None, after: bool = False) -> bool:
    """Whether the kernels can do this."""
    if getattr(norm, "kernels", None) != x.device.type or not x.numel() < 2**31 - 2**16:
        return False
    if x.dtype not in DTYPES[norm.kind] or (after and norm.kind == NUMBA):
        return False
    alike = add is None or (add.shape == x.shape and add.dtype == x.dtype)
    given = (x,) if add is None else (x, add)
    flat = all(t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) for t in given)
    return alike and flat and x.numel() > x.shape[1]


def _kernels(norm: nn.Module, x: Tensor, add: Tensor | None, after: bool) -> tuple[Tensor, Tensor]:
    if norm.training and torch.compiler.is_compiling():
        norm.num_batches_tracked.add_(1)
    else:
        norm.note()
    averages = norm.running_mean, norm.running_var, norm.momentum, norm.eps
    return NormRelu.apply(norm.kind, x, add, norm.weight, norm.bias, *averages, norm.training, after)


def prepare(model: nn.Module, kernels: bool = False, numba: bool = False) -> None:
    """Lets the BatchNorm2d of a model count their batches on the host. With `kernels` those that a ReLU follows, in our
    networks and in torchvision's ResNets, run as Triton's kernels, and so does the normalisation of images; with `numba` the
    former run as numba's on a CPU. The module is changed; names and values of its state are not."""
    for module in model.modules():
        if type(module) is Normalized and kernels and have_kernels(module.mean.device):
            module.__class__ = KernelNormalized
        if type(module) in (nn.BatchNorm2d, CountedNorm) and _usual(module):
            device = module.weight.device
            module.kind = TRITON if kernels and have_kernels(device) else None
            if numba and device.type == "cpu" and trouble_with_numba() is None:
                module.kind = NUMBA
            module.kernels = device.type if module.kind else None
            module.__class__, module.num_batches_tracked.unwritten = CountedNorm, [0]
    for module in model.modules() if kernels or numba else ():
        if type(module).__module__ == "torchvision.models.resnet":
            _resnet(module)


@contextlib.contextmanager
def without_kernels(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorms run as torch's operations, on copies of the running averages: for a gradient that is differentiated
    again, or taken after kernels have changed those averages, which autograd refuses."""
    norms = [(m, m.kernels) for m in model.modules() if isinstance(m, CountedNorm) and m.kernels]
    for norm, _ in norms:
        norm.kernels, norm.apart = None, True
    try:
        yield
    finally:
        for norm, kernels in norms:
            norm.kernels, norm.apart = kernels, False


def unwritten(model: nn.Module) -> list[tuple[list[int], int]]:
    """Of each BatchNorm that counts on the host: its counter, and what it says."""
    return [(b.unwritten, b.unwritten[0]) for b in model.buffers() if hasattr(b, "unwritten")]


def _usual(norm: nn.BatchNorm2d) -> bool:
    return norm.affine and norm.track_running_stats and norm.momentum is not None


def _resnet(module: nn.Module) -> None:
    """One of torchvision's modules for ResNets: blocks add before their last ReLU, the first BatchNorm has a ReLU too."""
    kind = type(module).__name__
    if kind in ("Bottleneck", "BasicBlock"):
        module.forward = MethodType(_block, module)
    elif kind == "ResNet" and type(module.bn1) is CountedNorm:
        module.bn1.__class__, module.relu = CountedNormRelu, nn.Identity()


def _block(block: nn.Module, x: Tensor) -> Tensor:
    shortcut = x if block.downsample is None else block.downsample(x)
    _, out = norm_relu(block.bn1, block.conv1(x))
    if not hasattr(block, "conv3"):
        return norm_add_relu(block.bn2, block.conv2(out), shortcut)
    _, out = norm_relu(block.bn2, block.conv2(out))
    return norm_add_relu(block.bn3, block.conv3(out), shortcut)
