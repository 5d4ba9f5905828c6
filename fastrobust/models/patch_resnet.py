"""A pre-activation ResNet for 32 x 32 images that computes nothing at full resolution: its stem takes patches."""

from __future__ import annotations

from torch import Tensor, nn

from fastrobust.models.fused import norm_relu
from fastrobust.models.preact_resnet import PreActBlock


class PatchResNet14(nn.Module):
    """Patches of 4 x 4 pixels, 2 apart, then three stages of two blocks: `preact_resnet18` of the same widths without its
    first stage. `width` is the number of channels of the first stage: 64 gives 2.78 M parameters and 0.21 GFLOP an image, a
    fifth of the operations of `preact_resnet18`."""

    def __init__(self, channels: int = 3, classes: int = 10, width: int = 64):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 4, 2, 1, bias=False)
        blocks, inputs = [], width
        for stage in range(3):
            outputs = width * 2**stage
            blocks += [PreActBlock(inputs, outputs, 1 if stage == 0 else 2), PreActBlock(outputs, outputs, 1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        _, out = norm_relu(self.bn, *self.blocks((self.conv(x), None)))
        return self.linear(out.mean((2, 3)))


def patch_resnet14(channels: int = 3, classes: int = 10, width: int = 64) -> nn.Module:
    return PatchResNet14(channels, classes, width)
