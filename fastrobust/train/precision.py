"""What `precision: auto` stands for: half precision where the hardware has it, and it is faster."""

from __future__ import annotations

import torch
from torch import nn

from fastrobust.config.schema import Config
from fastrobust.runtime import half, trial
from fastrobust.train.trials import speed


def choose(config: Config, device: torch.device, network: nn.Module | None = None) -> Config:
    """The config with the precisions of training and of evaluation that `auto` stands for. On a CPU with bf16 instructions a
    trial of the model decides, and says what it found. `network`: see `build_model`. Raises ConfigError if the model cannot
    take the images."""
    settings, gpu = config.evaluation, device.type == "cuda"
    asked = {"training": config.precision, "evaluation": settings.precision}
    if gpu and config.precision == "auto":
        asked["training"] = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif config.engine == "winograd" and config.precision == "auto":
        asked["training"] = "fp32"
    if unsure := [what for what, precision in asked.items() if precision == "auto"]:
        chosen, ratio = "fp32", None
        if not gpu and not config.deterministic and half.has_bf16():  # deterministic: a trial may end otherwise next time
            ratio = speed(config, network)
        if ratio is not None:
            chosen = "bf16" if ratio >= trial.SURE else "fp32"
            found = f"in a trial bf16 was {ratio:.2f} times as fast as fp32 on this processor"
            print(f"precision of {' and '.join(unsure)}: {chosen}, {found}", flush=True)
        asked |= dict.fromkeys(unsure, chosen)
    settings = settings.model_copy(update={"precision": asked["evaluation"]})
    return config.model_copy(update={"precision": asked["training"], "evaluation": settings})
