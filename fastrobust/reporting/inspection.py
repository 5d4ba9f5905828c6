"""What a report measures on a trained model: robust accuracy against epsilon, accuracies by class, and a few images with
their perturbations, adversarial predictions and input gradients. Small and quick: `fastrobust/evaluation/` evaluates."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastrobust.attack.gradient import ascend, input_gradient
from fastrobust.attack.pgd import pgd
from fastrobust.attack.threat import Threat, ball
from fastrobust.attack.verdicts import evaluating
from fastrobust.data.augment import to_unit
from fastrobust.data.sets import ImageSet

FACTORS = (0.25, 0.5, 1.0, 1.5, 2.0)  # the radii of the sweep, in units of the reference radius
STEPS = 10
PICTURES = 6


@dataclass(frozen=True)
class Picture:
    """One image. `image` uint8 C x H x W; `delta` and `gradient` (of the loss, at the image) fp32 C x H x W. The labels are
    class indices, `sure` and `adversarial_sure` the probabilities of the two predictions."""

    image: Tensor
    label: int
    predicted: int
    sure: float
    delta: Tensor
    adversarial: int
    adversarial_sure: float
    gradient: Tensor


@dataclass(frozen=True)
class Inspection:
    """`radii` holds (epsilon, how many of the `count` examples are robust), epsilon 0 first. `clean`, `robust` (at the
    reference radius) and `labels` are per example. `source` and `checksum` say which images these are."""

    count: int
    epsilon: float
    radii: list[tuple[float, int]]
    clean: Tensor
    robust: Tensor
    labels: Tensor
    pictures: list[Picture]
    norm: str = "linf"
    source: str = ""
    checksum: str = ""


def sweep(epsilon: float, norm: str, shape: tuple[int, ...]) -> list[float]:
    """The radii at which images (C x H x W) are attacked, none but `epsilon` beyond the whole box."""
    widest = max(epsilon, ball(norm, epsilon).widest(shape))
    return list(dict.fromkeys(min(f * epsilon, widest) for f in FACTORS))


def inspect(
    model: nn.Module,
    data: ImageSet,
    *,
    epsilon: float,
    seed: int = 0,
    norm: str = "linf",
    progress: Callable[[int], None] = lambda examples: None,
) -> Inspection:
    """Attacks every image of `data` with PGD-10, one restart and steps of a quarter of the radius, at each radius."""
    device = next(model.parameters()).device
    images = data.images.to(device).contiguous(memory_format=torch.channels_last)
    labels = data.labels.to(device)
    common = {"steps": STEPS, "restarts": 1, "seed": seed, "progress": lambda restart, examples: progress(examples)}
    wanted = sweep(epsilon, norm, images.shape[1:])
    found = {e: pgd(model, images, labels, threat=ball(norm, e), alpha=e / 4, **common) for e in wanted}
    clean, robust = found[epsilon].clean, found[epsilon].robust
    radii = [(0.0, int(clean.sum())), *((e, int(verdicts.robust.sum())) for e, verdicts in found.items())]
    chosen = one_of_each(data.labels, PICTURES)
    return Inspection(
        count=len(labels),
        epsilon=epsilon,
        radii=radii,
        clean=clean.cpu(),
        robust=robust.cpu(),
        labels=data.labels,
        pictures=take_pictures(model, images[chosen], labels[chosen], ball(norm, epsilon)),
        norm=norm,
        source=data.source,
        checksum=data.checksum(),
    )


def one_of_each(labels: Tensor, count: int) -> list[int]:
    """The place of the first example of each of `count` classes, spread evenly over the classes that are there."""
    classes = sorted(set(labels.tolist()))
    count = min(count, len(classes))
    spread = [classes[i * len(classes) // count] for i in range(count)]
    return [int((labels == c).nonzero()[0, 0]) for c in spread]


def take_pictures(model: nn.Module, images: Tensor, labels: Tensor, threat: Threat) -> list[Picture]:
    """The perturbations are those of PGD-10 from the image itself; images: uint8 N x C x H x W on the model's device."""
    x = to_unit(images)
    with evaluating(model):
        logits, first_gradient = input_gradient(model, x, labels)
        before = logits.softmax(1).max(1)
        delta = ascend(model, x, labels, torch.zeros_like(x), threat, threat.radius / 4, STEPS)
        with torch.no_grad():
            after = model(x + delta).float().softmax(1).max(1)
    return [
        Picture(
            image=images[i].cpu(),
            label=int(labels[i]),
            predicted=int(before.indices[i]),
            sure=float(before.values[i]),
            delta=delta[i].cpu(),
            adversarial=int(after.indices[i]),
            adversarial_sure=float(after.values[i]),
            gradient=first_gradient[i].cpu(),
        )
        for i in range(len(x))
    ]
