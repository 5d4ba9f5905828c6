"""Half precision on a CPU."""

from __future__ import annotations

from functools import partial

import torch


def has_bf16(instructions: str = "bf16") -> bool:
    """Whether the processor has instructions for products of bf16 matrices (AVX512-BF16, AMX, Arm's BF16), or those whose
    name ends so. An older torch does not tell."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(present is True for name, present in known.items() if name.endswith(instructions))


def passes(on: bool) -> torch.autocast:
    """A context in which a CPU makes passes in bf16, or in fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


FP32, BF16 = partial(passes, False), partial(passes, True)
