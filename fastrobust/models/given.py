"""What can be said of a network that a program gives, before it is called or where it fails."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fastrobust.runtime.errors import ConfigError


def check_module(network: Any, also: str = "") -> None:
    """Raise ConfigError for what is no network. also: what else may be given."""
    if isinstance(network, nn.Module):
        return
    if isinstance(network, type):
        found = f"the class {network.__name__}: give {network.__name__}(…)"
    elif callable(network):
        found = f"a {type(network).__name__}: give the network itself"
    else:
        found = f"{network!r:.80}"
    raise ConfigError(f"the model must be an nn.Module{also}; it is {found}")


def check_tensors(network: nn.Module) -> None:
    """Raise ConfigError for a network whose weights have no shape yet, or no gradients."""
    tensors = [*network.parameters(), *network.buffers()]
    if any(map(is_lazy, tensors)):
        raise ConfigError("the model has lazy layers without weights yet: call it once on some images before")
    if any(tensor.is_inference() for tensor in tensors):
        raise ConfigError("the model was made under torch.inference_mode, where nothing has gradients: make it outside")


def advice(network: nn.Module | None) -> str:
    """What may help a network that does not take images; empty for one with weights in fp32."""
    parameters = () if network is None else network.parameters()
    kinds = {parameter.dtype for parameter in parameters if parameter.is_floating_point()} - {torch.float32}
    return f": its weights are {min(map(str, kinds))}, give model.float()" if kinds else ""
