"""A trial of whether another way to make passes of a model is faster on this processor."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fastrobust.runtime import limits, memory
from fastrobust.runtime.operations import Operations

SURE = 1.15  # times as fast as the usual way: less may be chance
ENOUGH = 10e6  # floating-point operations of an image's forward pass: smaller networks gain little, and noise would decide
IMAGES, TIMED = 16, 3  # of a trial: images a step, steps of each way
Way = Callable[[], AbstractContextManager]  # makes the context in which passes are made


def speed(model: nn.Module, x: Tensor, run: Callable[[Tensor], object], usual: Way, other: Way) -> float | None:
    """How many times as fast `run`, which makes passes of the model on some of the images x, is in the context `other` as in
    the context `usual`, by the processor time of one thread, which other programs change little; None for a small network
    and where memory is short. The random generator and the model's mode are left as they were. x: float N x C x H x W."""
    state, threads, training = torch.get_rng_state(), torch.get_num_threads(), model.training
    torch.set_num_threads(1)  # several wait for each other at work, on a busy machine for long
    try:
        with Operations() as work, torch.no_grad():
            model.eval()(x[:1])
        fit = limits.available_memory() / 2 / max(1, memory.of_a_pass(model, x[:1]))  # or the trial ends the run
        model.train(training)
        if work.number < ENOUGH or fit < min(2, len(x)):
            return None
        x = x[: int(min(fit, len(x)))]
        seconds = {usual: [], other: []}
        for _ in range(1 + TIMED):
            for way in (usual, other):
                began = time.process_time()
                with way():
                    run(x)
                seconds[way].append(time.process_time() - began)
    finally:
        torch.set_rng_state(state)
        torch.set_num_threads(threads)
    return min(seconds[usual][1:]) / min(seconds[other][1:])
