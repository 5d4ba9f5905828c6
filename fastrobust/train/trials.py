"""Trials of a config's model, before its run begins: which way of making passes is faster on this processor."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust.config.schema import Config
from fastrobust.models import fused, products, winograd
from fastrobust.models.given import advice
from fastrobust.models.weights import build_model
from fastrobust.runtime import half, memory, trial
from fastrobust.runtime.errors import ConfigError, first_line
from fastrobust.train import engine

Passes = Callable[[Tensor], object]
FILTERED = 32  # images of a trial of convolutions, where filters are transformed once for all of them


def speed(config: Config, network: nn.Module | None = None) -> float | None:
    """`trial.speed` of bf16 over fp32."""
    with passes(config, network, trial.IMAGES) as made:
        return trial.speed(*made, half.FP32, half.BF16) if made else None


def engine_for(config: Config, device: torch.device, network: nn.Module | None = None) -> str:
    """The engine of a config whose precision is chosen. On a CPU `auto` is in bf16 with AMX `numba`; in fp32 what a trial of
    the model finds faster: `eager` or `winograd`; it says what it found. Raises ConfigError where the engine that is named
    cannot be had, or the model cannot take the images."""
    if device.type != "cpu":
        return engine.choose(config.engine, device)
    if config.engine in engine.BY_NUMBA:
        with_winograd = config.engine == "winograd"
        if trouble := trouble_with_winograd(config, network) if with_winograd else trouble_with_kernels(config):
            raise ConfigError(f"engine: {config.engine} cannot be had: {trouble}. Use auto")
    if config.engine == "auto" and config.precision == "bf16" and products.have_amx():
        trouble = fused.trouble_with_numba()
        print(
            f"engine: {'eager' if trouble else 'numba'}, this processor has AMX; {trouble or 'in bf16 it gains'}", flush=True
        )
        return "eager" if trouble else "numba"
    ratio = None
    if config.engine == "auto" and config.precision == "fp32" and not config.deterministic:
        ratio = speed_of_winograd(config, network)  # deterministic: a trial may end otherwise next time
    if ratio is None:
        return engine.choose(config.engine, device)
    chosen = "winograd" if ratio >= trial.SURE else "eager"
    print(f"engine: {chosen}, in a trial Winograd's convolutions were {ratio:.2f} times as fast as plain ones", flush=True)
    return chosen


def trouble_with_kernels(config: Config) -> str | None:
    """Why a run cannot have `engine: numba`, or None."""
    if config.precision == "fp16":
        return "it computes in fp32 or bf16, and precision is fp16"
    return fused.trouble_with_numba()


def trouble_with_winograd(config: Config, network: nn.Module | None) -> str | None:
    """Why a run cannot have these convolutions, or None."""
    if config.precision != "fp32":
        return f"it computes in fp32, and precision is {config.precision}"
    if network is not None:
        return winograd.trouble(network, winograd.CHANNELS)
    with passes(config, None, 1) as (model, *_):
        return winograd.trouble(model, winograd.CHANNELS)


def speed_of_winograd(config: Config, network: nn.Module | None) -> float | None:
    """`trial.speed` of these convolutions over plain ones; None where they cannot gain."""
    if network is not None and winograd.trouble(network, winograd.MANY):
        return None
    with passes(config, network, FILTERED) as made:
        if made is None or winograd.trouble(made[0], winograd.MANY):
            return None
        model, x, run = made
        size = max(phase.batch_size for phase in config.phases)
        memory.keep_freed(memory.of_a_pass(model.eval(), x[:1]) * size)  # as the run will: new memory hides the gain
        return trial.speed(model.train(), x, run, contextlib.nullcontext, winograd.Filtering)


@contextlib.contextmanager
def passes(config: Config, network: nn.Module | None, most: int) -> Iterator[tuple[nn.Module, Tensor, Passes] | None]:
    """A copy of the config's model, random images (at most so many) of its largest phase, and the passes of a training on
    some of them. Nothing changes, nor do random numbers that come later. None for a network that cannot be copied. Raises
    ConfigError if the model cannot take the images."""
    try:
        network = copy.deepcopy(network)
    except Exception:  # a network of someone's own may hold anything
        yield None
        return
    phase, state = max(config.phases, key=lambda phase: phase.resolution), torch.get_rng_state()
    try:
        model = build_model(config, ("0", "1"), network).to(memory_format=torch.channels_last).train()
        loss = lambda x: F.cross_entropy(model(x).float(), torch.zeros(len(x), dtype=torch.int64))
        shape = min(most, phase.batch_size), model.mean.numel(), phase.resolution, phase.resolution
        x = torch.rand(shape).contiguous(memory_format=torch.channels_last)
        yield model, x, lambda x: loss(x).backward()
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError, AttributeError) as error:
        pixels = f"{phase.resolution} x {phase.resolution} pixels"
        raise ConfigError(
            f"model.name: {config.model.name} cannot take {pixels} ({first_line(error)}){advice(network)}"
        ) from None
    finally:
        torch.set_rng_state(state)
