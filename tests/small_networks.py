"""Networks small enough for slow oracles, images for them, and the oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastrobust.models import Normalized

pytest.importorskip("highspy")
from scipy.optimize import linprog

SHAPE = (1, 6, 6)


def tiny(seed: int, scale: float = 2.0, deep: bool = True) -> nn.Module:
    """6 x 6 images -> 3 classes. Deep: two convolutions and a hidden layer; else one convolution."""
    torch.manual_seed(seed)
    if deep:
        layers = [nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), nn.Conv2d(3, 4, 2, 1, 1), nn.ReLU(), nn.Flatten()]
        layers += [nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 3)]
    else:
        layers = [nn.Conv2d(1, 2, 3, 2, 0), nn.Flatten(), nn.ReLU(), nn.Linear(8, 3)]
    model = Normalized(nn.Sequential(*layers), (0.3,), (0.5,)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return model


def images(count: int, seed: int = 0, shape=SHAPE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)


def decide(decider, indices: list[int], images: torch.Tensor, labels: torch.Tensor, timeout: float) -> list:
    """Each image's verdict, in this process. images: uint8 N x C x H x W."""
    verdicts = decider.look(indices, images, labels, timeout)
    each = zip(verdicts, indices, images, labels, strict=True)
    return [verdict or decider.search(*one, timeout) for verdict, *one in each]


def scaled(around, points: torch.Tensor) -> torch.Tensor:
    """Images (flat) as inputs of a reduced network."""
    inputs = ((points - around.centre) / around.radius)[:, around.kept]
    kept = torch.zeros(len(around.centre), dtype=torch.bool).index_fill_(0, around.kept, True)
    back = around.images(inputs)
    assert torch.allclose(back[:, kept], points[:, kept], rtol=0, atol=1e-12)
    assert (back[:, ~kept] == around.centre[~kept]).all()
    return inputs


def rows_at(around, points: torch.Tensor) -> list[torch.Tensor]:
    """The inputs of the reduced network's ReLUs at points, layer after layer."""
    points = scaled(around, points)
    known = torch.cat([points, torch.ones(len(points), 1, dtype=torch.float64)], 1)
    found = []
    for layer in around.layers:
        z = known @ around.weights[layer, : known.shape[1]].T
        found.append(z)
        known = torch.cat([known, z.clamp(min=0)], 1)
    return found


def program(around, row: torch.Tensor, pattern=None, ends=None) -> float:
    """The least value of a row over the box by a linear program: the triangle relaxation of every ReLU, or, with a pattern
    (+1 or -1 for each), the exact network where the ReLUs have these signs. ends: inputs that are held at -1 or 1 (0: none
    of both). inf where there is no such point."""
    count, inputs = len(around.lower), around.inputs
    weights, low, high = around.weights.numpy(), around.lower.numpy(), around.upper.numpy()
    z, one = np.delete(weights, inputs, 1), weights[:, inputs]
    r = np.hstack([np.zeros((count, inputs)), np.eye(count)])
    if pattern is None:
        slope = high / (high - low)
        rows = [z - r, r - slope[:, None] * z]  # r >= z; r <= slope (z - low)
        limits = [-one, slope * (one - low)]
        spans = [(0, None)] * count
    else:
        on = np.array(pattern) > 0
        rows = [np.where(on[:, None], -z, z), np.where(on[:, None], r - z, r), np.where(on[:, None], z - r, -r)]
        limits = [np.where(on, one, -one), np.where(on, one, 0), np.where(on, -one, 0)]
        spans = [(None, None)] * count
    box = [(e, e) if e else (-1, 1) for e in (ends.tolist() if ends is not None else [0] * inputs)]
    cost = np.delete(row.numpy(), inputs)
    found = linprog(cost, np.vstack(rows), np.concatenate(limits), bounds=box + spans, method="highs")
    return found.fun + row[inputs].item() if found.status == 0 else np.inf
