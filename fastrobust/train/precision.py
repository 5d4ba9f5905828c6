"""What `precision: auto` stands for: half precision where the hardware has it, and it is faster."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from fastrobust.config.schema import Config
from fastrobust.models.weights import build_model
from fastrobust.runtime import half
from fastrobust.runtime.errors import ConfigError, first_line


def choose(config: Config, device: torch.device, network: nn.Module | None = None) -> Config:
    """The config with the precisions of training and of evaluation that `auto` stands for. On a CPU with bf16 instructions a
    trial of the model decides, and says what it found. `network`: see `build_model`. Raises ConfigError if the model cannot
    take the images."""
    settings, gpu = config.evaluation, device.type == "cuda"
    asked = {"training": config.precision, "evaluation": settings.precision}
    if gpu and config.precision == "auto":
        asked["training"] = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if unsure := [what for what, precision in asked.items() if precision == "auto"]:
        chosen, ratio = "fp32", None
        if not gpu and not config.deterministic and half.has_bf16():  # deterministic: a trial may end otherwise next time
            ratio = speed(config, network)
        if ratio is not None:
            chosen = "bf16" if ratio >= half.SURE else "fp32"
            found = f"in a trial bf16 was {ratio:.2f} times as fast as fp32 on this processor"
            print(f"precision of {' and '.join(unsure)}: {chosen}, {found}", flush=True)
        asked |= dict.fromkeys(unsure, chosen)
    settings = settings.model_copy(update={"precision": asked["evaluation"]})
    return config.model_copy(update={"precision": asked["training"], "evaluation": settings})


def speed(config: Config, network: nn.Module | None = None) -> float | None:
    """`half.speed` of the passes of a training, on random images of the largest phase, with a copy of the model."""
    phase = max(config.phases, key=lambda phase: phase.resolution)
    shape = min(half.IMAGES, phase.batch_size), len(config.model.mean), phase.resolution, phase.resolution
    state = torch.get_rng_state()
    try:
        model = build_model(config, ("0", "1"), copy.deepcopy(network)).to(memory_format=torch.channels_last).train()
        x = torch.rand(shape).contiguous(memory_format=torch.channels_last)
        loss = lambda x: F.cross_entropy(model(x).float(), torch.zeros(len(x), dtype=torch.int64))
        return half.speed(model, x, lambda x: loss(x).backward())
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError, AttributeError) as error:
        pixels = f"{phase.resolution} x {phase.resolution} pixels"
        raise ConfigError(f"model.name: {config.model.name} cannot take {pixels} ({first_line(error)})") from None
    finally:
        torch.set_rng_state(state)
