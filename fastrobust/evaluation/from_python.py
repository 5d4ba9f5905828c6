"""`fastrobust.evaluate`: clean and robust accuracy of a program's own model on its own images, and
`fastrobust.adversarial_images`: the images that an attack finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastrobust.attack.verdicts import check_images, evaluating
from fastrobust.data import given
from fastrobust.data.augment import to_unit
from fastrobust.data.sets import ImageSet
from fastrobust.evaluation import results
from fastrobust.evaluation.accuracy import as_named, attack_names, report, run_attacks
from fastrobust.models.weights import weights_digest
from fastrobust.runtime.errors import ConfigError, DataError, first_line


@dataclass(frozen=True)
class Evaluation:
    """Accuracies with their 95 % intervals, over all images. clean, robust: which images are classified correctly, and at
    every point that any attack visited (bool N). attacks: for each in turn how many images it attacked and broke. weights,
    images: SHA-256 of what the figures are about."""

    clean_accuracy: float
    clean_interval: tuple[float, float]
    robust_accuracy: float
    robust_interval: tuple[float, float]
    examples: int
    attack: str
    norm: str
    epsilon: float
    clean: Tensor = field(repr=False)
    robust: Tensor = field(repr=False)
    attacks: list[dict[str, Any]] = field(repr=False)
    weights: str = field(repr=False)
    images: str = field(repr=False)


def evaluate(
    model: nn.Module,
    images: Any,
    labels: Any = None,
    *,
    epsilon: float,
    norm: str = "linf",
    attack: str = "pgd-50-10",
    alpha: float | None = None,
    batch_size: int = 500,
    seed: int = 0,
) -> Evaluation:
    """Attack a model in eval mode, where it is; its mode and gradients are left as they are.

    model: takes N x C x H x W, pixels in [0, 1], and gives logits N x classes; its normalisation is inside. images: uint8 or
    float in [0, 1], N x C x H x W; labels: N whole numbers; or a Dataset of (image, label) in place of both. epsilon: radius
    in pixels of [0, 1], in the norm "linf" or "l2". attack: one or several with commas, each on what the ones before left
    robust, as for the evaluate command: "pgd-50-10,autoattack". alpha: step size of PGD, by default epsilon / 4. Raises
    FastrobustError."""
    names, data = attack_names(attack), image_set(images, labels)
    check_model(model, data.images[:1])
    options = {"norm": norm, "epsilon": float(epsilon), "alpha": epsilon / 4 if alpha is None else alpha}
    records = run_attacks(model, data, names, **options, batch_size=batch_size, seed=seed)
    found = report(as_named(attack), records)
    return Evaluation(
        **{key: found[key] for key in ("clean_accuracy", "robust_accuracy", "examples", "attack", "norm", "epsilon")},
        clean_interval=tuple(found["clean_interval"]),
        robust_interval=tuple(found["robust_interval"]),
        clean=records[0].clean,
        robust=results.worst_case(records),
        attacks=[
            {"attack": r.settings["attack"], "attacked": int(r.attacked.sum()), "broken": int(r.broken.sum())}
            for r in records
        ],
        weights=weights_digest(model),
        images=data.checksum(),
    )


def adversarial_images(
    model: nn.Module,
    images: Tensor,
    labels: Any,
    *,
    epsilon: float,
    norm: str = "linf",
    attack: str = "pgd-50-10",
    alpha: float | None = None,
    batch_size: int = 500,
    seed: int = 0,
) -> Tensor:
    """The images as an attack changes them: float N x C x H x W in [0, 1], on the device of `images`, each in the ball
    around its own and in the box. An image that withstands the attack, or that is misclassified as it is, is given back as
    it is: an image that differs is one that the model gets right, and its change one that it gets wrong. Arguments as for
    `evaluate`; only `images` must be a tensor. Raises FastrobustError."""
    if not isinstance(images, Tensor):
        raise DataError(f"the images must be a tensor, N x C x H x W; they are a {type(images).__name__}")
    names, data = attack_names(attack), image_set(images, labels)
    check_model(model, data.images[:1])
    found = to_unit(data.images).clone()
    options = {"norm": norm, "epsilon": float(epsilon), "alpha": epsilon / 4 if alpha is None else alpha}
    run_attacks(model, data, names, **options, batch_size=batch_size, seed=seed, found=found)
    return found.to(images.device)


def image_set(images: Any, labels: Any = None, classes: Sequence[str] | None = None) -> ImageSet:
    """Images and labels of a program as an ImageSet; floats stay floats. Raises DataError."""
    if labels is None:
        found = given.read(images, classes)
        return ImageSet(
            torch.from_numpy(found.images).permute(0, 3, 1, 2), torch.from_numpy(found.labels), found.classes, ""
        )
    pixels, numbers = torch.as_tensor(images).detach().cpu(), torch.from_numpy(given.whole_numbers(labels))
    if pixels.is_floating_point():
        pixels = pixels.float()
    check_images(pixels, numbers)
    return ImageSet(pixels, numbers, tuple(map(str, range(int(numbers.max()) + 1))) if classes is None else classes, "")


def check_model(model: nn.Module, image: Tensor) -> None:
    """Raise ConfigError or DataError unless the model takes the image (1 x C x H x W) and gives logits."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if parameter is None:
        raise ConfigError(f"the model must be an nn.Module with parameters, it is a {type(model).__name__}")
    if parameter.is_meta:
        raise ConfigError("the model is on the device `meta`, where it has no values: load its weights onto another")
    try:
        with evaluating(model), torch.no_grad():
            logits = model((image.float() / 255 if image.dtype == torch.uint8 else image).to(parameter.device))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        shape = " x ".join(map(str, image.shape[1:]))
        raise DataError(f"the model does not take images of {shape}: {first_line(error)}") from None
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 1:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ConfigError(f"the model must give logits, N x classes; for one image it gives {found}")
