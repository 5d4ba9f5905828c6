"""`fastrobust.verify`: exact verdicts on a program's own network and images."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrobust.config.places import expand
from fastrobust.evaluation.answers import answers
from fastrobust.evaluation.from_python import check_model, image_set, number
from fastrobust.models.weights import weights_digest
from fastrobust.runtime import limits
from fastrobust.runtime.distributed import pick_device
from fastrobust.runtime.errors import DataError, FastrobustError, installing
from fastrobust.verification.store import Verdicts


@dataclass(frozen=True)
class Verification:
    """verdicts: for each image `verified` (none within epsilon is misclassified), `falsified`, `misclassified` (the image
    itself is) or `timeout`. verified_accuracy: share of the verified; upper_bound: with those that timed out."""

    verified_accuracy: float
    upper_bound: float
    epsilon: float
    verdicts: list[str] = field(repr=False)


def verify(
    model: nn.Module,
    images: Any,
    labels: Any = None,
    *,
    epsilon: float,
    timeout: float = 60.0,
    workers: int | None = None,
    device: str = "cpu",
    output: str | Path | None = None,
) -> Verification:
    """Decide for each image whether any image within epsilon (L-infinity, in pixels of [0, 1]) is misclassified.

    model: takes N x C x H x W, pixels in [0, 1], and gives logits; of convolutions, linear layers, BatchNorm, average and
    max pooling, padding, sums, concatenations, ReLUs and LeakyReLUs in any order. images: uint8 N x C x H x W; labels: N
    whole numbers; or a Dataset in place of both. timeout: seconds for one image. workers: processes, by default one for
    each core. device: where branch and bound works, cpu or cuda. output: a folder for verdicts and adversarial images, in
    which the same call goes on later. Raises FastrobustError, which names the layer that cannot be verified."""
    try:
        from fastrobust.verification import lowering  # which need scipy and HiGHS
        from fastrobust.verification import workers as pool
    except ImportError as error:
        raise FastrobustError(f"verification needs {error.name}: {installing('verify')}") from None
    epsilon, timeout = number("epsilon", epsilon), number("timeout", timeout)
    if not 0 < epsilon <= 1 or not 0 < timeout < 1e7:
        raise FastrobustError(f"epsilon must lie in (0, 1] and timeout be positive; they are {epsilon:g} and {timeout:g}")
    if workers is not None and (not isinstance(workers, int) or workers < 1):
        raise FastrobustError(f"workers must be a whole number from 1; it is {workers!r}")
    where = str(pick_device(device))
    data = image_set(model, images, labels)
    if data.images.dtype != torch.uint8:
        raise DataError("verification takes images as uint8: (images * 255).round().to(torch.uint8)")
    check_model(model, data.images[:1])
    network = lowering.lower_model(model, tuple(data.images.shape[1:]))
    numbers = list(range(len(data.labels)))
    settings = {"epsilon": epsilon, "weights": weights_digest(model), "images": data.checksum()}
    settings["answers"] = answers(model, data.images.shape[1:])
    with tempfile.TemporaryDirectory() as temporary:
        kept = Verdicts(Path(temporary if output is None else expand(output)), settings, settings)
        todo = [i for i in numbers if not pool.settled(kept.found.get(i), timeout)]
        pool.decide_all(model, network, data, kept, todo, numbers, epsilon, timeout, workers or limits.cores(), where)
        verdicts = [kept.found[i]["verdict"] for i in numbers]
    verified, undecided = verdicts.count("verified"), verdicts.count("timeout")
    return Verification(verified / len(numbers), (verified + undecided) / len(numbers), epsilon, verdicts)
