"""Half precision on a CPU."""

from __future__ import annotations

from functools import partial

import torch


def has_bf16() -> bool:
    """Whether the processor has instructions for products of bf16 matrices (AVX512-BF16, AMX, Arm's BF16)."""
    return any(present is True for name, present in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def passes(on: bool) -> torch.autocast:
    """A context in which a CPU makes passes in bf16, or in fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


FP32, BF16 = partial(passes, False), partial(passes, True)
