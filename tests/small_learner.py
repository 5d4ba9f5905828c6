"""A small network with BatchNorm, batches for it, optimisers, and the same training with plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust.train.optimizers import Adam, Sgd

RATES = [0.05, 0.2, 0.01, 0.3, 0.1, 0.02, 0.15, 0.07]


def sgd(**keys) -> Sgd:
    return Sgd(name="sgd", **keys)


def adam(**keys) -> Adam:
    return Adam(name="adam", **keys)


def make_model(seed: int = 0) -> nn.Module:
    """1 x 6 x 6 images, 4 classes; two kinds of normalisation-free layers around a BatchNorm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))


def make_batches(count: int, n: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(n, 1, 6, 6, generator=generator) for _ in range(count)]
    return [(x, torch.randint(4, (n,), generator=generator)) for x in images]


def plain_training(model: nn.Module, optimizer: torch.optim.Optimizer, batches, rates) -> None:
    for (x, y), lr in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def same_weights(a: nn.Module, b: nn.Module, atol: float = 1e-6) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
