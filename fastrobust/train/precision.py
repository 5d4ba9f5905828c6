"""What `precision: auto` stands for: half precision where the hardware has it, and it is faster."""

from __future__ import annotations

import copy
import time

import torch
import torch.nn.functional as F
from torch import nn

from fastrobust.config.schema import Config
from fastrobust.models.weights import build_model
from fastrobust.runtime import limits, memory
from fastrobust.runtime.errors import ConfigError, first_line
from fastrobust.runtime.operations import Operations

SURE = 1.15  # times as fast as fp32: less may be chance
ENOUGH = 10e6  # floating-point operations of an image's forward pass: smaller networks gain little, and noise would decide
IMAGES, TIMED = 16, 3  # of a trial: images a step, steps of each precision


def choose(config: Config, device: torch.device, network: nn.Module | None = None) -> str:
    """The precision of a run's passes. On a CPU with bf16 instructions a trial of the model decides, and says what it found.
    `network`: see `build_model`. Raises ConfigError if the model cannot take the images."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if config.deterministic or not has_bf16():  # deterministic: a trial may end otherwise the next time
        return "fp32"
    ratio = speed(config, network)
    if ratio is None:
        return "fp32"
    chosen = "bf16" if ratio >= SURE else "fp32"
    print(f"precision {chosen}: in a trial bf16 was {ratio:.2f} times as fast as fp32 on this processor", flush=True)
    return chosen


def has_bf16() -> bool:
    """Whether the processor has instructions for products of bf16 matrices (AVX512-BF16, AMX, Arm's BF16)."""
    return any(present is True for name, present in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def speed(config: Config, network: nn.Module | None = None) -> float | None:
    """How many times as fast passes in bf16 are as those in fp32, by the processor time of one thread, which other programs
    change little; None for a small network and where memory is short. On random images of the largest phase, with a copy of
    the model; the random generator is left as it was."""
    phase = max(config.phases, key=lambda phase: phase.resolution)
    shape = min(IMAGES, phase.batch_size), len(config.model.mean), phase.resolution, phase.resolution
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other at work, on a busy machine for long
    try:
        model = build_model(config, ("0", "1"), copy.deepcopy(network)).to(memory_format=torch.channels_last)
        x = torch.rand(shape).contiguous(memory_format=torch.channels_last)
        with Operations() as work, torch.no_grad():
            model.eval()(x[:1])
        fit = limits.available_memory() / 2 / max(1, memory.of_a_pass(model, x[:1]))  # or the trial ends the run
        if work.number < ENOUGH or fit < min(2, len(x)):
            return None
        x = x[: int(min(fit, len(x)))]
        model.train()
        seconds = {False: [], True: []}
        for step in range(2 * (1 + TIMED)):
            half, began = step % 2 == 1, time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                logits = model(x)
            F.cross_entropy(logits.float(), torch.zeros(len(x), dtype=torch.int64)).backward()
            seconds[half].append(time.process_time() - began)
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError, AttributeError) as error:
        pixels = f"{phase.resolution} x {phase.resolution} pixels"
        raise ConfigError(f"model.name: {config.model.name} cannot take {pixels} ({first_line(error)})") from None
    finally:
        torch.set_rng_state(state)
        torch.set_num_threads(threads)
    return min(seconds[False][1:]) / min(seconds[True][1:])
