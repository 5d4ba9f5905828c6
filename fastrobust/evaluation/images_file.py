"""Adversarial images in a file, with all that is needed to check them: `evaluate --save-images FILE`.

    clean, adversarial                          float32 N x C x H x W, pixels in [0, 1]
    labels, clean_prediction, adversarial_prediction   int64 N; a prediction is -1 where the logits are not finite
    numbers                                     int64 N, of each image in the whole test set
    facts                                       JSON: weights, images, attack, epsilon, alpha, classes, ...

An image that was misclassified from the start, and one that no attack broke, is its own adversarial image: the accuracy on
`adversarial` is the robust accuracy. `.npz` holds `facts` as text, `.safetensors` in its header.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from fastrobust import __version__
from fastrobust.attack.verdicts import evaluating, plain_fp32
from fastrobust.data.augment import to_unit
from fastrobust.data.sets import ImageSet
from fastrobust.runtime import limits
from fastrobust.runtime.errors import ConfigError
from fastrobust.runtime.files import check_writable, write_atomically

KINDS = (".npz", ".safetensors")


def check(file: Path, images: Tensor) -> None:
    """Raise ConfigError or RunError where the file could not be written in the end."""
    if file.suffix not in KINDS:
        raise ConfigError(f"--save-images {file}: its name must end in {' or '.join(KINDS)}")
    if not file.parent.is_dir():
        raise ConfigError(f"--save-images {file}: there is no folder {file.parent}")
    check_writable(file)
    needed, free = 16 * images.numel(), limits.available_memory()  # both sets, and the file's content while it is made
    if needed > free:
        fit = int(len(images) * free / needed / 2)
        raise ConfigError(f"--save-images needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free: --limit {fit}")


def predictions(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    """int64 N; -1 where logits are not finite. x: float N x C x H x W, on any device."""
    device = next(model.parameters()).device
    with evaluating(model), plain_fp32(), torch.no_grad():
        logits = torch.cat([model(part.to(device)).cpu() for part in x.split(batch_size)])
    return logits.argmax(1).where(logits.isfinite().all(1), -1)


def write(file: Path, model: nn.Module, data: ImageSet, adversarial: Tensor, batch_size: int, facts: dict[str, Any]) -> int:
    """Write what the head of this file says; returns how many images the model classifies correctly in `adversarial`.
    Raises RunError."""
    clean = to_unit(data.images)
    tensors = {
        "clean": clean,
        "adversarial": adversarial,
        "labels": data.labels,
        "clean_prediction": predictions(model, clean, batch_size),
        "adversarial_prediction": predictions(model, adversarial, batch_size),
        "numbers": torch.arange(len(clean)) if data.numbers is None else data.numbers,
    }
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = json.dumps(facts | {"classes": data.classes, "fastrobust": __version__})
    if file.suffix == ".npz":
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()} | {"facts": np.array(text)}
        write_atomically(file, lambda opened: np.savez(opened, **arrays))
    else:
        content = save(tensors, {"facts": text})
        write_atomically(file, lambda opened: opened.write(content))
    return int((tensors["adversarial_prediction"] == data.labels).sum())
