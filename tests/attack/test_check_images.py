"""Tests of what attacks take: uint8 or float pixels in [0, 1], and nothing else by mistake."""

import pytest
import torch
from torch import nn

from fastrobust.attack.pgd import pgd
from fastrobust.attack.threat import Threat
from fastrobust.attack.verdicts import check_images, classified
from fastrobust.runtime.errors import DataError

LABELS = torch.arange(8) % 3


class Brightness(nn.Module):
    """Three classes by the mean pixel: below 0.3, to 0.6, above."""

    def forward(self, x):
        mean = x.mean((1, 2, 3))[:, None]
        return -(mean - torch.tensor([0.15, 0.45, 0.8])).abs()


def images() -> torch.Tensor:
    levels = torch.tensor([38, 115, 204])[LABELS]
    return levels[:, None, None, None].expand(8, 1, 4, 4).to(torch.uint8)


def attack(x, y=LABELS, epsilon=0.01):
    return pgd(Brightness(), x, y, threat=Threat(epsilon), alpha=0.01, steps=2, restarts=1)


def test_float_images_are_taken_as_they_are():
    """A second division by 255 would make every image black."""
    x = images()
    by_bytes, by_floats = attack(x), attack(x.float() / 255)
    assert by_bytes.clean.all() and torch.equal(by_bytes.clean, by_floats.clean)
    assert torch.equal(by_bytes.robust, by_floats.robust)
    assert classified(Brightness(), x.double() / 255, LABELS).all()


@pytest.mark.parametrize(
    ("x", "y", "epsilon", "words"),
    [
        (images().float(), LABELS, 0.1, "divide them by 255"),
        ((images().float() / 255 - 0.5) / 0.2, LABELS, 0.1, "normalisation belongs into the model"),
        (images().float() / 255 * float("nan"), LABELS, 0.1, "8 images have pixels that are no finite numbers"),
        (images().int(), LABELS, 0.1, "must be uint8, or float"),
        (images()[0], LABELS, 0.1, "N x C x H x W"),
        (images(), LABELS + 1, 0.1, "label 3 is none of the model's 3 classes, 0 to 2"),
        (images(), LABELS - 1, 0.1, "at least 0"),
        (images(), LABELS[:4], 0.1, "one of at least 0 for each of the 8 images"),
        (images(), LABELS.float(), 0.1, "labels must be int64"),
        (images(), LABELS, 8, "did you mean 8/255"),
    ],
)
def test_everything_else_is_refused(x, y, epsilon, words):
    with pytest.raises(DataError, match=words):
        attack(x, y, epsilon)


def test_the_whole_range_is_allowed():
    check_images(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64), Threat(1.0))
