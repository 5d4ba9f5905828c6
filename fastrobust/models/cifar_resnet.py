"""Residual networks (He et al., 2016, "Deep Residual Learning") for 32 x 32 images: no pooling before the first stage, names
as in the weights that are published for CIFAR."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Convolutions of the given kernel sizes, each followed by BatchNorm; ReLU between them and after the sum."""

    def __init__(self, inputs: int, width: int, stride: int, kernels: tuple[int, ...], expansion: int):
        super().__init__()
        outputs, strided = width * expansion, kernels.index(3)  # the first convolution of 3 x 3 has the stride
        sizes = [inputs, *[width] * (len(kernels) - 1), outputs]
        for i, kernel in enumerate(kernels):
            step = stride if i == strided else 1
            setattr(self, f"conv{i + 1}", nn.Conv2d(sizes[i], sizes[i + 1], kernel, step, kernel // 2, bias=False))
            setattr(self, f"bn{i + 1}", nn.BatchNorm2d(sizes[i + 1]))
        self.count = len(kernels)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i in range(1, self.count + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            out = F.relu(out) if i < self.count else out
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    def __init__(self, channels: int, classes: int, counts: tuple[int, ...], kernels: tuple[int, ...], expansion: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        inputs = 64
        for stage, count in enumerate(counts):
            width, blocks = 64 * 2**stage, []
            for i in range(count):
                blocks.append(Block(inputs, width, 2 if stage and i == 0 else 1, kernels, expansion))
                inputs = width * expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(out.mean((2, 3)))


def cifar_resnet18(channels: int = 3, classes: int = 10) -> nn.Module:
    return CifarResNet(channels, classes, (2, 2, 2, 2), (3, 3), 1)


def cifar_resnet50(channels: int = 3, classes: int = 10) -> nn.Module:
    return CifarResNet(channels, classes, (3, 4, 6, 3), (1, 3, 1), 4)
