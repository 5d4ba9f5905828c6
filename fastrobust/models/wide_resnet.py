"""Wide residual networks for 32 x 32 images (Zagoruyko & Komodakis, 2016), with the two layouts that most published robust
weights have: TRADES' (Zhang et al., 2019) and DeepMind's (Gowal et al., 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """BatchNorm-ReLU-conv twice. Where the width changes, the shortcut is projected from the activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.convShortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class Stage(nn.Module):
    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """`depth` - 4 convolutions in three stages, 16, 32 and 64 times `width` channels. Names as in TRADES' weights."""

    unused = ("sub_block1.",)  # tensors that published files hold and no forward pass reads

    def __init__(self, channels: int, classes: int, depth: int, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.block1, self.block2, self.block3 = (Stage(blocks) for blocks in stages(Block, depth, width))
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(out)).mean((2, 3)))


class SiluBlock(nn.Module):
    """As `Block`, with SiLU, and with TensorFlow's padding of strided convolutions: below and to the right only."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(inputs)
        self.conv_0 = nn.Conv2d(inputs, outputs, 3, stride, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(outputs)
        self.conv_1 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.pad = (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = F.silu(self.batchnorm_0(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv_1(F.silu(self.batchnorm_1(self.conv_0(F.pad(out, self.pad))))) + shortcut


class SiluStage(nn.Module):
    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.block = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class SiluWideResNet(nn.Module):
    """Names as in DeepMind's weights. Theirs take images that are normalised with CIFAR-10's mean and deviation."""

    def __init__(self, channels: int, classes: int, depth: int, width: int):
        super().__init__()
        self.init_conv = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.layer = nn.Sequential(*(SiluStage(blocks) for blocks in stages(SiluBlock, depth, width)))
        self.batchnorm = nn.BatchNorm2d(64 * width)
        self.logits = nn.Linear(64 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(F.silu(self.batchnorm(self.layer(self.init_conv(x)))).mean((2, 3)))


def stages(block, depth: int, width: int) -> list[list[nn.Module]]:
    """The blocks of the three stages; the first of the second and third halves the resolution."""
    sizes, count = [16, 16 * width, 32 * width, 64 * width], (depth - 4) // 6
    return [
        [block(sizes[k] if i == 0 else sizes[k + 1], sizes[k + 1], 2 if k and i == 0 else 1) for i in range(count)]
        for k in range(3)
    ]


def wide_resnet28_10(channels: int = 3, classes: int = 10) -> nn.Module:
    return WideResNet(channels, classes, 28, 10)


def wide_resnet34_10(channels: int = 3, classes: int = 10) -> nn.Module:
    return WideResNet(channels, classes, 34, 10)


def wide_resnet28_10_silu(channels: int = 3, classes: int = 10) -> nn.Module:
    return SiluWideResNet(channels, classes, 28, 10)


def wide_resnet70_16_silu(channels: int = 3, classes: int = 10) -> nn.Module:
    return SiluWideResNet(channels, classes, 70, 16)
