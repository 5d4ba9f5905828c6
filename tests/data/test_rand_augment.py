"""RandAugment on the device against torchvision's, one image and one operation after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastrobust.config import sections
from fastrobust.data.augment import augment
from fastrobust.data.rand_augment import BINS, OPERATIONS, applied, rand_augment
from fastrobust.runtime.torchvision_compat import import_torchvision

THEIRS = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast")
THEIRS += ("Posterize", "Solarize", "AutoContrast")


def images(n: int, channels: int = 3, height: int = 24, width: int = 20) -> Tensor:
    """Smooth, so that a pixel from a place nearby is alike."""
    small = torch.rand(n, channels, 5, 5, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(small, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)
    return (255 * smooth).round().div(255).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0, 9, 30])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_torchvisions(name, magnitude, channels):
    torchvision = import_torchvision()
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.autoaugment import RandAugment, _apply_op

    theirs = THEIRS[OPERATIONS.index(name)]
    space = RandAugment()._augmentation_space(BINS, (24, 20))
    assert theirs in space and torchvision is not None
    magnitudes, signed = space[theirs]
    amount = float(magnitudes[magnitude]) if magnitudes.ndim > 0 else 0.0
    x = images(6, channels)
    sign = torch.tensor([1.0, -1.0] * 3) if signed else torch.ones(6)
    found = applied(x, torch.full((6,), OPERATIONS.index(name)), sign, magnitude)
    for k in range(6):
        whole = name in ("posterize", "solarize")  # theirs are for uint8, or count in it
        image = (255 * x[k]).round().byte() if whole else x[k]
        expected = _apply_op(image, theirs, amount * sign[k].item(), InterpolationMode.BILINEAR, None)
        expected = expected.float() / 255 if whole else expected
        torch.testing.assert_close(found[k], expected, rtol=0, atol=2e-4, msg=lambda text, k=k: f"image {k}: {text}")
    assert found.is_contiguous(memory_format=torch.channels_last) and found.min() >= 0 and found.max() <= 1


def test_images_draw_operations_of_their_own():
    """Every operation is drawn, as often as the others, and the images are done one by one."""
    x = images(1).expand(3000, -1, -1, -1)[:, :, :8, :8].contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    found = rand_augment(x, 1, 30)
    torch.manual_seed(0)
    drawn, sign = torch.randint(12, (3000,)), torch.randint(2, (3000,)) * 2.0 - 1
    counts = torch.bincount(drawn, minlength=12)
    assert counts.min() > 190 and counts.max() < 310
    for k in range(40):
        alone = applied(x[k : k + 1], drawn[k : k + 1], sign[k : k + 1], 30)
        torch.testing.assert_close(found[k : k + 1], alone, rtol=0, atol=1e-6)
    torch.manual_seed(0)
    twice = rand_augment(x[:5], 2, 30)
    torch.manual_seed(0)
    one = rand_augment(x[:5], 1, 30)
    torch.testing.assert_close(twice, rand_augment(one, 1, 30))


def test_the_config_asks_for_it():
    pixels = (255 * images(9)).round().byte()
    torch.manual_seed(0)
    found = augment(pixels, sections.Augment(randaugment=2, magnitude=20), 24)
    torch.manual_seed(0)
    torch.testing.assert_close(found, rand_augment(images(9), 2, 20))
    with pytest.raises(ValueError, match="less than or equal to 30"):
        sections.Augment(magnitude=31)
