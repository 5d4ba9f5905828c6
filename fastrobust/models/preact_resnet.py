"""Pre-activation ResNet-18 for 32 x 32 images (He et al., 2016, "Identity Mappings in Deep Residual Networks"), and the form
that it has in the paper's published code, with the names of its published weights."""

import torch.nn.functional as F
from torch import Tensor, nn


class PreActBlock(nn.Module):
    """BatchNorm-ReLU-conv twice. A strided or widening block projects its shortcut after the first activation; with `paper`,
    as in the paper's code, from the block's raw input."""

    def __init__(self, inputs: int, outputs: int, stride: int, paper: bool = False):
        super().__init__()
        self.paper = paper
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            project = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(project) if paper else project

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(x if self.paper else out)
        out = self.conv1(out)
        return self.conv2(F.relu(self.bn2(out))) + shortcut


class PreActResNet18(nn.Module):
    """Four stages of two blocks. `width` is the number of channels of the first stage: 64 gives 11.17 M parameters."""

    def __init__(self, channels: int = 3, classes: int = 10, width: int = 64, paper: bool = False):
        super().__init__()
        stages = {"conv1" if paper else "conv": nn.Conv2d(channels, width, 3, 1, 1, bias=False)}
        blocks, inputs = [], width
        for stage in range(4):
            outputs = width * 2**stage
            blocks += [PreActBlock(inputs, outputs, min(stage, 1) + 1, paper), PreActBlock(outputs, outputs, 1, paper)]
            inputs = outputs
        if paper:
            stages |= {f"layer{k + 1}": nn.Sequential(*blocks[2 * k : 2 * k + 2]) for k in range(4)}
        else:
            stages["blocks"] = nn.Sequential(*blocks)
        for name, module in stages.items():
            self.add_module(name, module)
        self.bn = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        *stages, bn, linear = self.children()
        for stage in stages:
            x = stage(x)
        return linear(F.relu(bn(x)).mean((2, 3)))


def preact_resnet18(channels: int = 3, classes: int = 10) -> nn.Module:
    return PreActResNet18(channels, classes)


def preact_resnet18_w16(channels: int = 3, classes: int = 10) -> nn.Module:
    """A quarter of the width, for small experiments: 0.70 M parameters."""
    return PreActResNet18(channels, classes, width=16)


def preact_resnet18_paper(channels: int = 3, classes: int = 10) -> nn.Module:
    return PreActResNet18(channels, classes, paper=True)
