"""Half precision on a CPU: whether the processor has it, and a trial of whether it is faster."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastrobust.runtime import limits, memory
from fastrobust.runtime.operations import Operations

SURE = 1.15  # times as fast as fp32: less may be chance
ENOUGH = 10e6  # floating-point operations of an image's forward pass: smaller networks gain little, and noise would decide
IMAGES, TIMED = 16, 3  # of a trial: images a step, steps of each precision


def has_bf16() -> bool:
    """Whether the processor has instructions for products of bf16 matrices (AVX512-BF16, AMX, Arm's BF16)."""
    return any(present is True for name, present in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def passes(on: bool) -> torch.autocast:
    """A context in which a CPU makes passes in bf16, or in fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


def speed(model: nn.Module, x: Tensor, run: Callable[[Tensor], object]) -> float | None:
    """How many times as fast `run`, which makes passes of the model on some of the images x, is in bf16 as in fp32, by the
    processor time of one thread, which other programs change little; None for a small network and where memory is short.
    The random generator and the model's mode are left as they were. x: float N x C x H x W."""
    state, threads, training = torch.get_rng_state(), torch.get_num_threads(), model.training
    torch.set_num_threads(1)  # several wait for each other at work, on a busy machine for long
    try:
        with Operations() as work, torch.no_grad():
            model.eval()(x[:1])
        fit = limits.available_memory() / 2 / max(1, memory.of_a_pass(model, x[:1]))  # or the trial ends the run
        model.train(training)
        if work.number < ENOUGH or fit < min(2, len(x)):
            return None
        x = x[: int(min(fit, IMAGES))]
        seconds = {False: [], True: []}
        for step in range(2 * (1 + TIMED)):
            half, began = step % 2 == 1, time.process_time()
            with passes(half):
                run(x)
            seconds[half].append(time.process_time() - began)
    finally:
        torch.set_rng_state(state)
        torch.set_num_threads(threads)
    return min(seconds[False][1:]) / min(seconds[True][1:])
