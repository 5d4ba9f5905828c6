"""A network and images of one's own, and a short `fastrobust.fit` of them."""

from __future__ import annotations

import torch
from conftest import bar_images
from torch import nn

import fastrobust

FEW = {"evaluation.steps": 5, "evaluation.restarts": 1, "optimizer.name": "adam"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 4, 2, 1), nn.ReLU())
        self.head = nn.Linear(16 * 49, 10)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


def bars(count: int, seed: int):
    """(uint8 N x C x H x W tensors, labels)"""
    images, labels = bar_images(count, seed)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


TRAIN, TEST = bars(600, 0), bars(100, 1)


def fit(network, folder, data=TRAIN, test=TEST, **options):
    torch.manual_seed(0)
    options = {"epsilon": 0.05, "epochs": 3, "batch_size": 30, "lr": 5e-3, "output": folder, "config": FEW} | options
    return fastrobust.fit(network, data, test=test, **options)
