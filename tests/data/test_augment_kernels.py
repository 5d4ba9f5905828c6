"""Tests of fastrobust.data.augment_kernels: the pixels of the plain functions, to the last digit."""

import pytest
import torch
from triton_kernels import DEVICE, needs_kernels

from fastrobust.config.sections import Augment
from fastrobust.data.augment import augment


@needs_kernels
@pytest.mark.parametrize("crop", ["pad", "none"])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shape", [(9, 3, 7, 5), (4, 1, 28, 28)], ids=str)
def test_pixels_are_those_of_the_plain_functions(monkeypatch, crop, flip, shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    config, used = Augment(crop=crop, padding=3, flip=flip), []
    from fastrobust.data import augment_kernels

    original = augment_kernels.shift_flip
    monkeypatch.setattr(augment_kernels, "shift_flip", lambda *a: used.append(1) or original(*a))
    found = []
    for kernels in (False, True):
        torch.manual_seed(5)
        found.append(augment(images, config, shape[2], kernels))
        after = torch.rand(1, device=DEVICE).item()  # the generator stands at the same place
        found[-1] = found[-1], after
    (expected, generator), (pixels, other) = found
    assert torch.equal(pixels, expected) and pixels.dtype == torch.float32 and generator == other
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert len(used) == (crop == "pad" or flip)
    assert (crop == "none" and not flip) or not torch.equal(pixels, images.float() / 255)


@needs_kernels
def test_images_in_another_order_go_to_torch(monkeypatch):
    monkeypatch.setattr("fastrobust.data.augment_kernels.shift_flip", lambda *arguments: pytest.fail("the kernel was used"))
    images = torch.randint(0, 256, (4, 3, 6, 6), dtype=torch.uint8, device=DEVICE)
    assert augment(images, Augment(crop="pad"), 6, True).shape == (4, 3, 6, 6)
