"""Two networks of RobustBench's model zoo and its normalisation, written out in plain PyTorch with the published names; and
RobustBench itself, where it is installed."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrobust.runtime.torchvision_compat import import_torchvision


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class PreActBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return out + (self.shortcut(x) if hasattr(self, "shortcut") else x)


class Stages(nn.Module):
    def __init__(self, block, counts, num_classes, last):
        super().__init__()
        self.conv1, inputs = nn.Conv2d(3, 64, 3, 1, 1, bias=False), 64
        for stage, count in enumerate(counts):
            blocks = []
            for i in range(count):
                blocks.append(block(inputs, 64 * 2**stage, 2 if stage and i == 0 else 1))
                inputs = 64 * 2**stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        if last:
            self.bn = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, num_classes)

    def rest(self, x):
        out = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        out = F.relu(self.bn(out)) if hasattr(self, "bn") else out
        return self.linear(F.avg_pool2d(out, 4).flatten(1))


class ResNet(Stages):
    def __init__(self, block, counts, num_classes=10):
        super().__init__(block, counts, num_classes, False)
        self.bn1 = nn.BatchNorm2d(64)

    def forward(self, x):
        return self.rest(F.relu(self.bn1(self.conv1(x))))


class PreActResNet(Stages):
    def __init__(self, block, counts, num_classes=10, bn_before_fc=False):
        super().__init__(block, counts, num_classes, bn_before_fc)

    def forward(self, x):
        return self.rest(self.conv1(x))


class ImageNormalizer(nn.Module):
    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.as_tensor(std).view(1, 3, 1, 1))

    def forward(self, x):
        return (x - self.mean) / self.std


def normalize_model(model, mean, std):
    return nn.Sequential(OrderedDict(normalize=ImageNormalizer(mean, std), model=model))


def written_out(monkeypatch) -> None:
    """`import robustbench...` gives the classes above."""
    zoo = "robustbench.model_zoo.architectures"
    classes = {"BasicBlock": BasicBlock, "ResNet": ResNet, "PreActBlock": PreActBlock, "PreActResNet": PreActResNet}
    for name, content in {"resnet": classes, "utils_architectures": {"normalize_model": normalize_model}}.items():
        module = types.ModuleType(f"{zoo}.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("robustbench", "robustbench.model_zoo", zoo):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


def real(monkeypatch) -> types.ModuleType:
    """RobustBench itself; the test is skipped where it cannot be imported. It looks for AutoAttack under its old name."""
    try:
        import_torchvision()
        import pyautoattack
        import pyautoattack.state

        monkeypatch.setitem(sys.modules, "autoattack", pyautoattack)
        monkeypatch.setitem(sys.modules, "autoattack.state", pyautoattack.state)
        import robustbench

        return robustbench
    except ImportError as error:
        pytest.skip(f"needs RobustBench ({error})")
