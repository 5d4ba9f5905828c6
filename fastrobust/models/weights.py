"""Weights files: plain tensors, with all that is needed to build the model in their header."""

import hashlib
import json
import os
import shlex
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from fastrobust import __version__
from fastrobust.config import places, reading
from fastrobust.config.schema import Config
from fastrobust.models import Normalized, create
from fastrobust.models.given import check_module
from fastrobust.runtime.errors import FastrobustError, RunError
from fastrobust.runtime.files import SAFETENSORS, kind_of_file, write_atomically
from fastrobust.runtime.run_directory import CONFIG, WEIGHTS

_OTHERS = (
    "Weights of another program: `fastrobust evaluate FILE --model NAME --dataset NAME --epsilon RADIUS` attacks them, and\n"
    "fastrobust.verify(model, images, labels, epsilon=RADIUS) in Python verifies their model. Only runs are exported."
)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of the weights' names and values: what a result says it is about, whichever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_weights(run: Path, model: torch.nn.Module, config: Config, classes: tuple[str, ...], name: str = WEIGHTS) -> None:
    tensors = {name: t.detach().contiguous().cpu() for name, t in model.state_dict().items()}
    metadata = {"fastrobust": __version__, "config": json.dumps(config.to_dict()), "classes": json.dumps(classes)}
    metadata["sha256"] = weights_checksum(tensors, metadata)
    content = save(tensors, metadata)
    write_atomically(run / name, lambda file: file.write(content))


def weights_checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of the weights, and of the config and classes in their file's header; safetensors has none of its own."""
    digest = hashlib.sha256(f"{metadata['config']}\n{metadata['classes']}".encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"\n{name} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_weights(path: str | Path, network: nn.Module | None = None) -> tuple[nn.Module, Config, tuple[str, ...]]:
    """(model in eval mode on the CPU, config, class names) from a run directory or a .safetensors file. `network` takes the
    weights in place of the one that the config names. Raises RunError or ConfigError."""
    path = Path(path)
    weights = path / WEIGHTS if path.is_dir() else path
    if not weights.is_file():
        runs = [str(file.parent) for file in sorted(path.glob(f"*/{WEIGHTS}"))[:5]]
        hint = f"; name one of the runs in {path}, such as {', '.join(runs)}" if runs else ""
        if (path / CONFIG).is_file():
            hint = f"; the run is not finished: `fastrobust train --resume {shlex.quote(str(path))}`"
        raise RunError(f"there are no weights at {weights}{hint}")
    refuse_others(weights)
    try:
        with safe_open(weights, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata.get("sha256", "absent") not in ("absent", weights_checksum(tensors, metadata)):
            raise ValueError("its checksum does not fit: it was changed after it was written")
        config = reading.parse(json.loads(metadata["config"]), str(weights))
        classes = tuple(json.loads(metadata["classes"]))
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise RunError(f"{weights} is damaged: {error}") from None
    except KeyError as error:
        raise RunError(f"{weights} was not written by fastrobust: its header has no {error}\n{_OTHERS}") from None
    model = build_model(config, classes, network)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise RunError(f"the weights in {weights} do not fit {config.model.name}: {error}") from None
    model.classes = classes
    return model.eval(), config, classes


def refuse_others(path: Path) -> None:
    """Raise RunError, which says what the file is, if it is not one of weights, whole or damaged."""
    if (kind := kind_of_file(path)) not in (None, SAFETENSORS):
        run = path.parent if (path.parent / CONFIG).is_file() else "RUN"
        own = f"a run's are opened by its directory, {run}"
        raise RunError(f"{path} is {kind}, not weights that fastrobust wrote; {own}\n{_OTHERS}")


def load(run: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The trained model of a run directory or .safetensors file, ready to use: in eval mode, on the CPU, normalisation
    inside. Takes images in [0, 1], float N x C x H x W, and gives logits N x classes. `model`: for a run of `fit` that was
    given a network, one of the same class, which takes the weights. Raises RunError."""
    if not isinstance(run, str | os.PathLike):
        raise RunError(f"load takes a run directory or a .safetensors file; it was given a {type(run).__name__}")
    try:
        if model is not None:
            check_module(model)
        return read_weights(places.expand(run), model)[0]
    except FastrobustError as error:
        raise RunError(str(error)) from None


def build_model(config: Config, classes: tuple[str, ...], network: nn.Module | None = None) -> nn.Module:
    """The model that a config names, or the network that a program gave, behind the config's normalisation."""
    if network is not None:
        return Normalized(network, config.model.mean, config.model.std)
    config = config if config.facts.channels else config.with_channels(3)  # a run that has not looked at its files
    about = {"mean": config.model.mean, "std": config.model.std, "options": config.model.options}
    return create(config.model.name, channels=len(config.model.mean), classes=len(classes), **about)
