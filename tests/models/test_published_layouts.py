"""The networks of published robust weights: names and shapes of the tensors, and the forward pass written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrobust import models
from fastrobust.models.cifar_resnet import CifarResNet
from fastrobust.models.wide_resnet import SiluWideResNet, WideResNet


def moved(model: nn.Module) -> dict[str, torch.Tensor]:
    """Statistics, scales and shifts away from 0 and 1; the weights of the model, in eval mode."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval().state_dict()


def norm(x, w, name):
    return F.batch_norm(x, w[f"{name}.running_mean"], w[f"{name}.running_var"], w[f"{name}.weight"], w[f"{name}.bias"])


def test_wide_resnet_written_out_with_trades_names():
    model = WideResNet(3, 10, 16, 2)
    w, x = moved(model), torch.rand(2, 3, 32, 32)
    out = F.conv2d(x, w["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for k in (0, 1):
            name, stride = f"block{stage}.layer.{k}", 2 if stage > 1 and k == 0 else 1
            first = F.relu(norm(out, w, f"{name}.bn1"))
            second = F.relu(norm(F.conv2d(first, w[f"{name}.conv1.weight"], stride=stride, padding=1), w, f"{name}.bn2"))
            shortcut = F.conv2d(first, w[f"{name}.convShortcut.weight"], stride=stride) if k == 0 else out
            out = F.conv2d(second, w[f"{name}.conv2.weight"], padding=1) + shortcut
    pooled = F.avg_pool2d(F.relu(norm(out, w, "bn1")), 8).flatten(1)
    torch.testing.assert_close(model(x), F.linear(pooled, w["fc.weight"], w["fc.bias"]), rtol=1e-4, atol=1e-5)


def test_wide_resnet_written_out_with_deepminds_names():
    model = SiluWideResNet(3, 10, 16, 2)
    w, x = moved(model), torch.rand(2, 3, 32, 32)
    out = F.conv2d(x, w["init_conv.weight"], padding=1)
    for stage in (0, 1, 2):
        for k in (0, 1):
            name, stride = f"layer.{stage}.block.{k}", 2 if stage and k == 0 else 1
            first = F.silu(norm(out, w, f"{name}.batchnorm_0"))
            padded = F.pad(first, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
            second = F.silu(norm(F.conv2d(padded, w[f"{name}.conv_0.weight"], stride=stride), w, f"{name}.batchnorm_1"))
            shortcut = F.conv2d(first, w[f"{name}.shortcut.weight"], stride=stride) if k == 0 else out
            out = F.conv2d(second, w[f"{name}.conv_1.weight"], padding=1) + shortcut
    pooled = F.avg_pool2d(F.silu(norm(out, w, "batchnorm")), 8).flatten(1)
    torch.testing.assert_close(model(x), F.linear(pooled, w["logits.weight"], w["logits.bias"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kernels", "expansion"), [((3, 3), 1), ((1, 3, 1), 4)])
def test_cifar_resnet_written_out(kernels, expansion):
    model = CifarResNet(3, 10, (1, 2, 1, 1), kernels, expansion)
    w, x = moved(model), torch.rand(2, 3, 32, 32)
    out = F.relu(norm(F.conv2d(x, w["conv1.weight"], padding=1), w, "bn1"))
    for name in ("layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0"):
        stride, inner = 2 if name in ("layer2.0", "layer3.0", "layer4.0") else 1, out
        for i, kernel in enumerate(kernels, 1):
            step = stride if kernel == 3 and i == kernels.index(3) + 1 else 1
            inner = F.conv2d(inner, w[f"{name}.conv{i}.weight"], stride=step, padding=kernel // 2)
            inner = norm(inner, w, f"{name}.bn{i}")
            inner = F.relu(inner) if i < len(kernels) else inner
        if f"{name}.shortcut.0.weight" in w:
            out = norm(F.conv2d(out, w[f"{name}.shortcut.0.weight"], stride=stride), w, f"{name}.shortcut.1")
        out = F.relu(inner + out)
    pooled = F.avg_pool2d(out, 4).flatten(1)
    torch.testing.assert_close(model(x), F.linear(pooled, w["linear.weight"], w["linear.bias"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "parameters"),  # as published with the weights
    [
        ("cifar_resnet18", 11_173_962),
        ("cifar_resnet50", 23_520_842),
        ("wide_resnet28_10", 36_479_194),
        ("wide_resnet34_10", 46_160_474),
        ("wide_resnet28_10_silu", 36_479_194),
        ("preact_resnet18_wong2020", 11_172_170 - 1024),
    ],
)
def test_their_size(name, parameters):
    model = models.create(name, channels=3, classes=10, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert sum(p.numel() for p in model.parameters()) == parameters
