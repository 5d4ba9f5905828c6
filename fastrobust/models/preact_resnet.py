"""Pre-activation ResNet-18 for 32 x 32 images (He et al., 2016, "Identity Mappings in Deep Residual Networks")."""

from __future__ import annotations

from torch import Tensor, nn

from fastrobust.models.fused import norm_relu, norm_silu


def activated(activation: str):
    """BatchNorm with this activation. Raises ValueError."""
    if activation not in ("relu", "silu"):
        raise ValueError(f"there is no activation '{activation}', only relu and silu")
    return norm_relu if activation == "relu" else norm_silu


class PreActBlock(nn.Module):
    """BatchNorm-activation-conv twice; a strided or widening block projects its shortcut after the first activation. Input
    and output are pairs (x, what is to be added to x or None): the next BatchNorm adds."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: str = "relu"):
        super().__init__()
        self.activated = activated(activation)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, pair: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
        x, out = self.activated(self.bn1, *pair)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        _, out = self.activated(self.bn2, self.conv1(out))
        return self.conv2(out), shortcut


class PreActResNet(nn.Module):
    """Stages of two blocks behind a first convolution. `width` is the number of channels of the first stage; activation:
    `relu` or `silu`."""

    def __init__(self, stem: nn.Conv2d, classes: int, width: int, stages: int, activation: str = "relu"):
        super().__init__()
        self.activated = activated(activation)
        self.conv = stem
        blocks, inputs = [], width
        for stage in range(stages):
            outputs = width * 2**stage
            stride = 1 if stage == 0 else 2
            blocks += [PreActBlock(inputs, outputs, stride, activation), PreActBlock(outputs, outputs, 1, activation)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        _, out = self.activated(self.bn, *self.blocks((self.conv(x), None)))
        return self.linear(out.mean((2, 3)))


class PreActResNet18(PreActResNet):
    """Four stages. A `width` of 64 gives 11.17 M parameters."""

    def __init__(self, channels: int = 3, classes: int = 10, width: int = 64):
        super().__init__(nn.Conv2d(channels, width, 3, 1, 1, bias=False), classes, width, stages=4)


def preact_resnet18(channels: int = 3, classes: int = 10) -> nn.Module:
    return PreActResNet18(channels, classes)


def preact_resnet18_w16(channels: int = 3, classes: int = 10) -> nn.Module:
    """A quarter of the width, for small experiments: 0.70 M parameters."""
    return PreActResNet18(channels, classes, width=16)
