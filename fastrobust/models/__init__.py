"""Models by name, each behind its normalisation: they take images in [0, 1] and give logits."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from fastrobust.config import parts
from fastrobust.config.hints import nearest
from fastrobust.models.pixels import Normalized
from fastrobust.runtime.errors import ConfigError, first_line, installing
from fastrobust.runtime.torchvision_compat import import_torchvision


def in_sequence(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a Sequential in their order, those of sequences within it too; anything else is one module."""
    if isinstance(model, nn.Sequential):
        for child in model:
            yield from in_sequence(child)
    else:
        yield model


GIVEN = "given/"  # starts the name of a model that a program gave from Python; its class follows


def create(
    name: str,
    *,
    channels: int,
    classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """A freshly initialised model. Names: ours, torchvision's, `timm/NAME`, or `package.module:function` for a function of
    (channels, classes) that returns an nn.Module. options: further arguments by name. Raises ConfigError."""
    options = options or {}
    if name.startswith(GIVEN):
        raise ConfigError(
            f"model.name: the network {name.removeprefix(GIVEN)} was given from Python and is not stored with the run, only "
            "its weights are. From Python: fastrobust.load(RUN, model=NETWORK); commands: docs/python.md, `model`"
        )
    if name in parts.MODELS or ":" in name:
        make = parts.find("model.name", parts.MODELS, name)
        if not callable(make):
            raise ConfigError(f"model.name: {name} must be a function of (channels, classes), it is a {type(make).__name__}")
        network = _made(name, options, make, channels, classes)
        if not isinstance(network, nn.Module):
            raise ConfigError(f"model.name: {name} must return an nn.Module, it returns {type(network).__name__}")
    elif name.startswith("timm/"):
        network = _timm(name.removeprefix("timm/"), channels, classes, options)
    else:
        network = _torchvision(name, channels, classes, options)
    return Normalized(network, mean, std)


def _made(name: str, options: dict[str, Any], make: Callable, *arguments, **keywords) -> nn.Module:
    """The network of a function. Raises ConfigError where it does not take the options."""
    try:
        return make(*arguments, **keywords, **options)
    except Exception as error:  # the user's function can raise anything
        if options and isinstance(error, TypeError | ValueError):
            raise ConfigError(f"model.options: {name} does not take {options}: {first_line(error)}") from None
        raise ConfigError(f"model.name: '{name}' raised {type(error).__name__}: {first_line(error)}") from error


def _torchvision(name: str, channels: int, classes: int, options: dict[str, Any]) -> nn.Module:
    models = import_torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        near = nearest(name, [*parts.MODELS, *known])
        hint = (
            f"did you mean '{near}'?"
            if near
            else f"ours: {', '.join(parts.MODELS)}; or any of torchvision's, timm/NAME, or your own package.module:function"
        )
        raise ConfigError(f"model.name: there is no model '{name}'; {hint}")
    if channels != 3:
        raise ConfigError(f"model.name: torchvision's {name} takes 3 channels, the images have {channels}")
    fixed = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return _made(name, options, models.get_model, name, weights=None, num_classes=classes, **fixed)


def _timm(name: str, channels: int, classes: int, options: dict[str, Any]) -> nn.Module:
    try:
        import_torchvision()  # timm imports it
        import timm
    except ImportError:
        raise ConfigError(f"model.name: timm/{name} needs timm: {installing('timm')}") from None
    if name not in timm.list_models():
        near = nearest(name, timm.list_models())
        raise ConfigError(f"model.name: timm has no model '{name}'" + (f"; did you mean 'timm/{near}'?" if near else ""))
    fixed = {"pretrained": False, "num_classes": classes, "in_chans": channels}
    return _made(f"timm/{name}", options, timm.create_model, name, **fixed)
