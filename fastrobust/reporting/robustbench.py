"""Weights in RobustBench's layout: a state dict that its own classes load, and the lines that load it."""

from __future__ import annotations

from torch import Tensor, nn

from fastrobust.config import parts
from fastrobust.config.schema import Config

ZOO = "robustbench.model_zoo.architectures"
PLACES = {  # what an entry of RobustBench's model zoo imports for our networks: module, names, the network
    "cifar_resnet18": ("resnet", "BasicBlock, ResNet", "ResNet(BasicBlock, [2, 2, 2, 2], num_classes={n})"),
    "cifar_resnet50": ("resnet", "Bottleneck, ResNet", "ResNet(Bottleneck, [3, 4, 6, 3], num_classes={n})"),
    "preact_resnet18_paper": (
        "resnet",
        "PreActBlock, PreActResNet",
        "PreActResNet(PreActBlock, [2, 2, 2, 2], num_classes={n}, bn_before_fc=True)",
    ),
    "preact_resnet18_wong2020": (
        "resnet",
        "PreActBlock, PreActResNet",
        "PreActResNet(PreActBlock, [2, 2, 2, 2], num_classes={n})",
    ),
    "wide_resnet28_10": ("wide_resnet", "WideResNet", "WideResNet(depth=28, widen_factor=10, num_classes={n})"),
    "wide_resnet34_10": ("wide_resnet", "WideResNet", "WideResNet(depth=34, widen_factor=10, num_classes={n})"),
    "wide_resnet28_10_silu": (
        "dm_wide_resnet",
        "DMWideResNet",
        "DMWideResNet({n}, 28, 10, nn.SiLU, mean={mean}, std={std})",
    ),
    "wide_resnet70_16_silu": (
        "dm_wide_resnet",
        "DMWideResNet",
        "DMWideResNet({n}, 70, 16, nn.SiLU, mean={mean}, std={std})",
    ),
}


def state(model: nn.Module, config: Config) -> dict[str, Tensor] | None:
    """The weights under the names of RobustBench's class; None where it has no class for this network. Most classes stand
    behind RobustBench's `normalize_model`; DeepMind's normalises by itself."""
    if usage(config, 0) is None:
        return None
    network = {name: t.contiguous() for name, t in model.network.state_dict().items()}
    if config.model.name.endswith("_silu"):
        return network
    constants = {f"normalize.{name}": getattr(model, name).reshape(1, 3, 1, 1) for name in ("mean", "std")}
    return constants | {f"model.{name}": tensor for name, tensor in network.items()}


def usage(config: Config, classes: int) -> str | None:
    """Python that makes `model` of `robustbench.pt`, or None."""
    name, mean, std = config.model.name, tuple(config.model.mean), tuple(config.model.std)
    options = "".join(f", {key}={value!r}" for key, value in (config.model.options or {}).items())
    lines = ["import torch"]
    if name in PLACES and len(mean) == 3 and not options:
        module, names, network = PLACES[name]
        network = network.format(n=classes, mean=mean, std=std)
        lines += [f"from {ZOO}.{module} import {names}"]
    elif name not in parts.MODELS and ":" not in name and len(mean) == 3:
        library, word = ("timm", name.removeprefix("timm/")) if name.startswith("timm/") else ("torchvision", name)
        extra = ", aux_logits=False, init_weights=True" if name in ("googlenet", "inception_v3") else ""
        make = "timm.create_model" if library == "timm" else "torchvision.models.get_model"
        network = f"{make}({word!r}, num_classes={classes}{extra}{options})"
        lines += [f"import {library}"]
    else:
        return None
    if name.endswith("_silu"):
        lines += ["from torch import nn", "", f"model = {network}"]
    else:
        lines += [f"from {ZOO}.utils_architectures import normalize_model", ""]
        lines += [f"model = normalize_model({network}, {mean}, {std})"]
    return "\n".join([*lines, 'model.load_state_dict(torch.load("robustbench.pt", weights_only=True))', "model.eval()"])
