"""BatchNorm and ReLU as one operation that can be differentiated, by whichever kernels there are (`norm_kernels.py`,
`norm_numba.py`)."""

from __future__ import annotations

import torch

TRITON, NUMBA = "triton", "numba"


def kernels_of(kind: str):
    """A module with `norm_relu` and `norm_relu_backward`; importing it needs Triton or numba. The imports are written out:
    torch's compiler follows no others."""
    if kind == TRITON:
        from fastrobust.models import norm_kernels as kernels
    else:
        from fastrobust.models import norm_numba as kernels
    return kernels


class NormRelu(torch.autograd.Function):
    """(z, y) of `norm_relu` with its derivatives. Where the sum comes after, or there is none, z is empty. kind: whose
    kernels."""

    @staticmethod
    def forward(ctx, kind, x, add, weight, bias, running_mean, running_var, momentum, eps, train, after):
        given = weight, bias, running_mean, running_var, momentum, eps, train, after
        z, y, mean, rstd = kernels_of(kind).norm_relu(x, add, *given)
        before = add is not None and not after
        statistics = (mean, rstd) if train else (running_mean, running_var)
        ctx.save_for_backward(z if before else x, y if after else None, weight, bias, *statistics)
        ctx.facts = kind, eps, train, before
        ctx.set_materialize_grads(False)
        if not before:
            ctx.mark_non_differentiable(z)
        return z, y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dz, dy):
        x, y, weight, bias, mean, spread = ctx.saved_tensors
        kind, eps, train, before = ctx.facts
        own = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        dy = torch.zeros_like(x) if dy is None else dy.contiguous(memory_format=torch.channels_last)
        dz = dz.contiguous(memory_format=torch.channels_last) if before and dz is not None else None
        backward = kernels_of(kind).norm_relu_backward
        dx, dadd, dweight, dbias = backward(x, dy, dz, y, weight, bias, mean, spread, eps, train, train or own)
        dadd = dx if before else dadd if y is not None else None
        dweight, dbias = (dweight.to(weight.dtype), dbias.to(bias.dtype)) if own else (None, None)
        return None, dx, dadd, dweight, dbias, None, None, None, None, None, None
