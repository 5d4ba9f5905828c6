"""Weights that other programs wrote: what is in a PyTorch or safetensors file, and how it gets into a model.

Nothing in a file is executed. Names are matched to the model's: wrappers' prefixes (`module.`, `_orig_mod.`, ...) are taken
off, and the section of the file that holds the weights is found. What does not fit is an error that lists names and shapes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastrobust.models import Normalized
from fastrobust.runtime.errors import ConfigError, RunError, first_line
from fastrobust.runtime.files import CUT, PICKLE, SAFETENSORS, TORCH, kind_of_file
from fastrobust.runtime.run_directory import WEIGHTS

SECTIONS = (  # of a file of torch.save, averaged weights before live ones
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "model_state_dict", "state_dict", "model", "network", "net",
    "params", "weights", "best_state_dict",
)  # fmt: skip
PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.", "backbone.", "encoder.", "0.", "1.")
CONSTANTS = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}  # last words of a normalisation's names
OBJECTS = ("nsupported global", "unsupported GLOBAL", "allowlisted", "unrecognized function")  # why torch.load refused
LISTED = 6  # names in a message


class Unread:
    """What stands where a file has one of NumPy's numbers, such as its best accuracy: nobody asks for it. So what the file
    says of it is dropped, and none of NumPy's own code sees it."""

    def __init__(self, *of: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


NUMPY = [  # the names that a NumPy number has in a file, of NumPy 2 and 1: torch looks them up by module and name
    type(name, (Unread,), {"__module__": module, "__qualname__": name})
    for module, name in (("numpy._core.multiarray", "scalar"), ("numpy.core.multiarray", "scalar"), ("numpy", "dtype"))
]


class Fit(NamedTuple):
    """How a file's tensors fit a model. tensors: those to load, by the model's names. head: tensors of the last layer that
    the file has for another number of classes. mean, std: the normalisation that the file holds, or None."""

    tensors: dict[str, Tensor]
    head: list[str]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def read(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a `.safetensors` file, one of torch.save or a run directory, by the file's names, and the section in
    which they stood ("" for none). Raises RunError."""
    path = Path(path)
    path = path / WEIGHTS if path.is_dir() else path
    if not path.is_file():
        raise RunError(f"there is no weights file {path}")
    kind = kind_of_file(path)
    if kind not in (None, SAFETENSORS, TORCH, PICKLE, CUT):
        wanted = "a file of torch.save(model.state_dict(), FILE), one of safetensors or a run's directory"
        raise RunError(f"{path} is {kind}, not weights: {wanted} is needed")
    objects = (
        f"{path} holds Python objects, which could run code when read: in the program that made it, write "
        "the tensors alone: torch.save(model.state_dict(), FILE)"
    )
    if kind == PICKLE:
        raise RunError(objects)
    try:
        if kind == SAFETENSORS:
            return load_file(path), ""
        with torch.serialization.safe_globals([argparse.Namespace, *NUMPY]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise RunError(f"{path} is damaged: {first_line(error)}") from None
    except Exception as error:  # a damaged file, or one that was made to harm, can raise anything
        reason = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error) or type(error).__name__
        if any(word in reason for word in OBJECTS):
            raise RunError(objects) from None
        reason = "perhaps it was cut short" if kind == CUT or isinstance(error, EOFError) else reason.splitlines()[0][:200]
        raise RunError(f"{path} is not a file of weights, or damaged: {reason}") from None
    return _section(found, path)


def _section(found: Any, path: Path) -> tuple[dict[str, Tensor], str]:
    """The dictionary of tensors in what torch.load gave, however deep it lies."""
    taken = []
    for _ in range(4):
        if not isinstance(found, dict):
            break
        tensors = {name: t for name, t in found.items() if isinstance(name, str) and isinstance(t, Tensor)}
        name = next((name for name in SECTIONS if isinstance(found.get(name), dict)), None)
        if name is None or len(tensors) > 1:
            if tensors:
                return tensors, ".".join(taken)
            break
        taken.append(name)
        found = found[name]
    there = f": it holds {', '.join(map(str, list(found)[:LISTED]))}" if isinstance(found, dict) else ""
    raise RunError(f"{path} holds no state dict, tensors by name{there or f', but a {type(found).__name__}'}")


def fit(model: Normalized, tensors: dict[str, Tensor], where: str, replace_head: bool = False) -> Fit:
    """Match the tensors of a file to a model's network. With `replace_head` the last layer may be for another number of
    classes. Raises ConfigError, which starts with `where` and lists what does not fit."""
    network = model.network.state_dict()
    unused = getattr(model.network, "unused", ())
    fitting: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}
    channels = model.mean.numel()
    for name, tensor in tensors.items():
        own = _own_name(name, network)
        if own in network and own not in fitting:
            fitting[own] = tensor
        elif (word := CONSTANTS.get(name.rpartition(".")[2])) and tensor.numel() == channels:
            constants[word] = tensor.flatten().double()
        elif not own.startswith(unused or ("\0",)) and not name.endswith("num_batches_tracked"):
            left[name] = tensor
    absent = [name for name in network if name not in fitting and not name.endswith("num_batches_tracked")]
    odd = [name for name, t in fitting.items() if t.shape != network[name].shape]
    last = list(network)[-1].rpartition(".")[0]
    head = [name for name in odd if name.rpartition(".")[0] == last and fitting[name].shape[1:] == network[name].shape[1:]]
    head = head if replace_head else []
    other = [name for name in odd if name not in head]
    kinds = [
        [f"{name}: the file has {_form(fitting[name])}, the model {_form(network[name])}" for name in other],
        [f"{name} {_form(network[name])}: not in the file" for name in absent],
        [f"{name} {_form(t)}: not in the model" for name, t in left.items()],
    ]
    if any(kinds):
        each = LISTED // sum(map(bool, kinds))
        lines = [f"{where} do not fit the model:"]
        for kind in kinds:
            lines += kind[:each] + ([f"and {len(kind) - each} more"] if len(kind) > each else [])
        raise ConfigError("\n  ".join(lines))
    for name, tensor in fitting.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ConfigError(f"{where}: {name} holds infinite numbers or NaN")
    mean, std = (tuple(constants[word].tolist()) if word in constants else None for word in ("mean", "std"))
    return Fit({name: t for name, t in fitting.items() if name not in head}, head, mean, std)


def _own_name(name: str, known: dict[str, Tensor]) -> str:
    """The name without the prefixes of wrappers, if that is one of the known ones."""
    while name not in known and (prefix := next((p for p in PREFIXES if name.startswith(p)), None)):
        name = name.removeprefix(prefix)
    return name


def _form(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"


def load_into(model: Normalized, path: str | Path, classes: tuple[str, ...]) -> str:
    """Copy a file's weights into the model, which has these classes. The head keeps its first weights where the file's is
    for others, and has its rows in the order of `classes` where the file names them. Returns what was done, in words.
    Raises RunError or ConfigError, also where the file's normalisation is not the model's."""
    tensors, section = read(path)
    found = fit(model, tensors, f"the weights in {path}", replace_head=True)
    found, reordered = for_classes(found, model, classes_in(path), classes)
    for word, theirs, ours in (("mean", found.mean, model.mean), ("std", found.std, model.std)):
        if theirs is not None and not torch.allclose(torch.tensor(theirs), ours.flatten().float().cpu(), atol=1e-3):
            values = ", ".join(f"{v:.4g}" for v in theirs)
            raise ConfigError(f"{path} holds a normalisation of its own: set model.{word} to [{values}]")
    assign(model, found)
    told = f"{len(found.tensors)} tensors of {path}" + (f", its section {section}" if section else "")
    told += "; the rows of the head in the order of the classes here" if reordered else ""
    return told + (f"; a new head, {', '.join(found.head)}: the file's is for other classes" if found.head else "")


def classes_in(path: str | Path) -> tuple[str, ...] | None:
    """The classes that a file of fastrobust names, None where a file does not say. Raises RunError."""
    path = Path(path)
    path = path / WEIGHTS if path.is_dir() else path
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(json.loads((file.metadata() or {})["classes"]))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return None


def for_classes(found: Fit, model: Normalized, theirs: tuple[str, ...] | None, ours: tuple[str, ...]) -> tuple[Fit, bool]:
    """The same for the classes `ours`, where the file's head is for `theirs`, and whether its rows were put into another
    order. Where the names are others its head is left out."""
    last = list(model.network.state_dict())[-1].rpartition(".")[0]
    rows = [name for name in found.tensors if name.rpartition(".")[0] == last]
    if theirs is None or theirs == ours or any(len(found.tensors[name]) != len(ours) for name in rows):
        return found, False
    if sorted(theirs) != sorted(ours):
        return found._replace(tensors={n: t for n, t in found.tensors.items() if n not in rows}, head=rows), False
    order = [theirs.index(name) for name in ours]
    return found._replace(tensors=found.tensors | {name: found.tensors[name][order] for name in rows}), True


def assign(model: Normalized, found: Fit) -> None:
    mine = model.network.state_dict()
    with torch.no_grad():
        for name, tensor in found.tensors.items():
            mine[name].copy_(tensor)
