"""The pre-activation ResNet-18 of the paper's published code, with the names of its published weights."""

from __future__ import annotations

from torch import Tensor, nn

from fastrobust.models.fused import norm_relu


class PaperPreActBlock(nn.Module):
    """BatchNorm-ReLU-conv twice. A strided or widening block projects its shortcut from the block's raw input; in He et al.
    (2016), and in `preact_resnet18`, it is projected from the activated input. Input and output are pairs (x, what is to be
    added to x or None): the next BatchNorm adds."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, pair: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
        x, out = norm_relu(self.bn1, *pair)
        _, out = norm_relu(self.bn2, self.conv1(out))
        return self.conv2(out), self.shortcut(x)


class PaperPreActResNet18(nn.Module):
    """Four stages of two blocks, 64 channels in the first: 11.17 M parameters. The weights that RobustBench lists as
    Wong2020Fast are of a network without the last BatchNorm and ReLU."""

    def __init__(self, channels: int = 3, classes: int = 10, last_batchnorm: bool = True):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        self.layer1 = nn.Sequential(PaperPreActBlock(64, 64, 1), PaperPreActBlock(64, 64, 1))
        self.layer2 = nn.Sequential(PaperPreActBlock(64, 128, 2), PaperPreActBlock(128, 128, 1))
        self.layer3 = nn.Sequential(PaperPreActBlock(128, 256, 2), PaperPreActBlock(256, 256, 1))
        self.layer4 = nn.Sequential(PaperPreActBlock(256, 512, 2), PaperPreActBlock(512, 512, 1))
        self.bn = nn.BatchNorm2d(512) if last_batchnorm else None
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        pair = self.layer4(self.layer3(self.layer2(self.layer1((self.conv1(x), None)))))
        out = sum(pair) if self.bn is None else norm_relu(self.bn, *pair)[1]
        return self.linear(out.mean((2, 3)))


def preact_resnet18_paper(channels: int = 3, classes: int = 10) -> nn.Module:
    return PaperPreActResNet18(channels, classes)


def preact_resnet18_wong2020(channels: int = 3, classes: int = 10) -> nn.Module:
    return PaperPreActResNet18(channels, classes, last_batchnorm=False)
