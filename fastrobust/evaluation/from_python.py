"""`fastrobust.evaluate`: clean and robust accuracy of a program's own model on its own images, and
`fastrobust.adversarial_images`: the images that an attack finds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastrobust.attack.verdicts import check_images, check_logits, evaluating
from fastrobust.config.numbers import parse_number
from fastrobust.data import given
from fastrobust.data.augment import to_unit
from fastrobust.data.sets import ImageSet
from fastrobust.evaluation import results
from fastrobust.evaluation.accuracy import arithmetic_of, as_named, attack_names, report, run_attacks
from fastrobust.models import Normalized
from fastrobust.models.given import advice, check_module, check_tensors
from fastrobust.models.weights import weights_digest
from fastrobust.runtime.errors import ConfigError, DataError, first_line


@dataclass(frozen=True)
class Evaluation:
    """Accuracies with their 95 % intervals, over all images. clean, robust: which images are classified correctly, and at
    every point that any attack visited (bool N). attacks: for each in turn how many images it attacked and broke, and what
    its steps computed in. weights, images: SHA-256 of what the figures are about."""

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


@torch.inference_mode(False)
@torch.enable_grad()
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
    precision: str = "auto",
) -> Evaluation:
    """Attack a model in eval mode, where it is; its mode and gradients are left as they are.

    model: takes N x C x H x W, pixels in [0, 1], and gives logits N x classes; its normalisation is inside. images: uint8 or
    float in [0, 1], N x C x H x W; labels: N whole numbers; or a Dataset of (image, label) in place of both, whose
    `classes` are matched with those of a model that fastrobust made. epsilon: radius in pixels of [0, 1], in the norm "linf"
    or "l2". attack: one or several with commas, each on what the ones before left robust, as for the evaluate command:
    "pgd-50-10,autoattack". alpha: step size of PGD, by default epsilon / 4. precision: "fp32", "bf16" or "auto", of PGD's
    steps on a CPU (`searched_in`); what breaks an image is decided in fp32 always. Raises FastrobustError."""
    names, options = asked(attack, epsilon, norm, alpha, batch_size, seed, precision)
    data = image_set(model, images, labels)
    check_model(model, data.images[:1])
    records = run_attacks(model, data, names, **options)
    found = report(as_named(attack), records)
    return Evaluation(
        **{key: found[key] for key in ("clean_accuracy", "robust_accuracy", "examples", "attack", "norm", "epsilon")},
        clean_interval=tuple(found["clean_interval"]),
        robust_interval=tuple(found["robust_interval"]),
        clean=records[0].clean,
        robust=results.worst_case(records),
        attacks=[
            {
                "attack": r.settings["attack"],
                "attacked": int(r.attacked.sum()),
                "broken": int(r.broken.sum()),
                "arithmetic": arithmetic_of(r),
            }
            for r in records
        ],
        weights=weights_digest(model),
        images=data.checksum(),
    )


@torch.inference_mode(False)
@torch.enable_grad()
def adversarial_images(
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
    precision: str = "auto",
) -> Tensor:
    """The images as an attack changes them: float N x C x H x W in [0, 1], on the device of `images`, each in the ball
    around its own and in the box. An image that withstands the attack, or that is misclassified as it is, is given back as
    it is: an image that differs is one that the model gets right, and its change one that it gets wrong. Arguments as for
    `evaluate`; images that are no tensor come back on the CPU. Raises FastrobustError."""
    names, options = asked(attack, epsilon, norm, alpha, batch_size, seed, precision)
    data = image_set(model, images, labels)
    check_model(model, data.images[:1])
    found = to_unit(data.images).clone()
    run_attacks(model, data, names, **options, found=found)
    return found.to(images.device) if isinstance(images, Tensor) else found


def asked(
    attack: Any, epsilon: Any, norm: str, alpha: Any, batch_size: Any, seed: Any, precision: Any
) -> tuple[list[str], dict[str, Any]]:
    """The names of the attacks, and the other arguments of `run_attacks`. Raises ConfigError for what cannot be meant."""
    if not isinstance(attack, str):
        raise ConfigError(f"attack must be text, several with commas, such as 'pgd-50-10,autoattack'; it is {attack!r}")
    epsilon = number("epsilon", epsilon)
    alpha = epsilon / 4 if alpha is None else number("alpha", alpha)
    if epsilon < 0 or alpha < 0 or (alpha == 0 < epsilon):
        raise ConfigError(f"epsilon must not be negative and alpha be more than 0; they are {epsilon:g} and {alpha:g}")
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise ConfigError(f"{name} must be a whole number from {least}; it is {value!r}")
    if precision not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"precision must be 'auto', 'fp32' or 'bf16'; it is {precision!r}")
    options = {"norm": norm, "epsilon": epsilon, "alpha": alpha, "batch_size": batch_size, "seed": seed}
    return attack_names(attack), options | {"precision": precision}


def number(name: str, value: Any) -> float:
    """An argument that is one number, also written `8/255`. Raises ConfigError."""
    try:
        found = float(parse_number(value))
    except ValueError as error:
        raise ConfigError(f"{name}: {first_line(error)}") from None
    except (TypeError, RuntimeError):
        raise ConfigError(f"{name} must be one number; it is {value!r:.80}") from None
    if not math.isfinite(found):
        raise ConfigError(f"{name} must be a finite number; it is {found:g}")
    return found


def image_set(model: nn.Module, images: Any, labels: Any = None) -> ImageSet:
    """Images and labels of a program as an ImageSet; floats stay floats. Of a Dataset that names its classes the labels are
    those of the model, by name, if it knows its own. Raises DataError."""
    classes = model.classes if isinstance(model, Normalized) else None
    if labels is None:
        found = given.read(images) if classes is None else given.read_for(classes, images, "the model")
        return ImageSet(
            torch.from_numpy(found.images).permute(0, 3, 1, 2), torch.from_numpy(found.labels), found.classes, ""
        )
    pixels = torch.as_tensor(images if isinstance(images, Tensor) else given.channels_first(images)).detach().cpu()
    if not pixels.numel():
        raise DataError("there are no images")
    numbers = torch.from_numpy(given.whole_numbers(labels))
    pixels = pixels.clone() if pixels.is_inference() else pixels
    if pixels.is_floating_point():
        pixels = pixels.float()
    check_images(pixels, numbers)
    if pixels.dtype == torch.uint8:
        given.check_bytes(pixels)
    return ImageSet(pixels, numbers, tuple(map(str, range(int(numbers.max()) + 1))) if classes is None else classes, "")


def check_model(model: nn.Module, image: Tensor) -> None:
    """Raise ConfigError or DataError unless the model takes the image (1 x C x H x W) and gives logits."""
    check_module(model)
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ConfigError(f"the model must be an nn.Module with parameters, a {type(model).__name__} has none")
    check_tensors(model)
    if parameter.is_meta:
        raise ConfigError("the model is on the device `meta`, where it has no values: load its weights onto another")
    try:
        with evaluating(model), torch.no_grad():
            logits = model((image.float() / 255 if image.dtype == torch.uint8 else image).to(parameter.device))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        shape = " x ".join(map(str, image.shape[1:]))
        raise DataError(f"the model does not take images of {shape}: {first_line(error)}{advice(model)}") from None
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 1:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ConfigError(f"the model must give logits, N x classes; for one image it gives {found}")
    check_logits(logits)
