"""The comparator: FGSM adversarial training and PGD evaluation as most public code for this paper does them.

Contiguous NCHW memory, normalisation outside the model and so a radius per channel, clamps against tensors of bounds, an
attack pass that computes weight gradients and throws them away, `.item()` after every step, images augmented one by one in
DataLoader workers. It learns the same thing; it is here to be timed, and to be agreed with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2471, 0.2435, 0.2616)


class Images(Dataset):
    """uint8 N x 3 x 32 x 32; each item is padded, cropped, flipped and normalised by itself."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        self.images, self.labels = images.contiguous(), labels
        self.mean, self.std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        padded = F.pad(self.images[i], (4, 4, 4, 4))
        top, left = torch.randint(9, (2,)).tolist()
        image = padded[:, top : top + 32, left : left + 32].float() / 255
        if torch.rand(()).item() < 0.5:
            image = image.flip(2)
        return (image - self.mean) / self.std, int(self.labels[i])


def loader(images: torch.Tensor, labels: torch.Tensor, batch_size: int, workers: int, pin: bool) -> DataLoader:
    data = Images(images, labels)
    return DataLoader(
        data, batch_size, shuffle=True, num_workers=workers, pin_memory=pin, persistent_workers=workers > 0, drop_last=True
    )


class UsualLoop:
    """FGSM from a random start with the paper's CIFAR-10 settings. `half` uses autocast and a loss scale."""

    def __init__(self, network: nn.Module, device: torch.device, *, half: bool = False, steps: int = 10_000):
        self.model = network.to(device).train()
        self.device = device
        self.half = half
        mean = torch.tensor(MEAN, device=device)[:, None, None]
        std = torch.tensor(STD, device=device)[:, None, None]
        self.lower, self.upper = (0 - mean) / std, (1 - mean) / std
        self.epsilon, self.alpha = 8 / 255 / std, 10 / 255 / std
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4)
        self.scheduler = torch.optim.lr_scheduler.CyclicLR(
            self.optimizer, 0.0, 0.2, step_size_up=steps // 2, step_size_down=steps // 2, cycle_momentum=False
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.loss = self.accuracy = 0.0

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        x, y = x.to(self.device), y.to(self.device)
        delta = torch.zeros_like(x)
        for channel in range(3):
            radius = self.epsilon[channel].item()
            delta[:, channel].uniform_(-radius, radius)
        delta = torch.max(torch.min(delta, self.upper - x), self.lower - x).requires_grad_()
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            loss = F.cross_entropy(self.model(x + delta), y)
        self.scaler.scale(loss).backward()
        moved = delta.detach() + self.alpha * delta.grad.sign()
        moved = torch.max(torch.min(moved, self.epsilon), -self.epsilon)
        moved = torch.max(torch.min(moved, self.upper - x), self.lower - x)
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            output = self.model(x + moved)
            loss = F.cross_entropy(output, y)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.loss += loss.item() * len(y)
        self.accuracy += (output.max(1)[1] == y).sum().item()


def plain_pgd(model, images, labels, noise, *, epsilon, alpha, steps, restarts, batch_size) -> torch.Tensor:
    """PGD on every example, through every step of every restart, in fixed batches. `noise(restart, first, count)` gives the
    starts. Returns which examples were classified correctly at every point (bool, N), the clean images included."""
    robust = []
    for first in range(0, len(labels), batch_size):
        x = images[first : first + batch_size].float() / 255
        y = labels[first : first + batch_size]
        with torch.no_grad():
            good = model(x).argmax(1) == y
        for restart in range(restarts):
            delta = torch.max(torch.min(noise(restart, first, len(y)), 1 - x), -x)
            for _ in range(steps):
                delta.requires_grad_()
                output = model(x + delta)
                good &= output.argmax(1) == y
                (gradient,) = torch.autograd.grad(F.cross_entropy(output, y, reduction="sum"), delta)
                delta = (delta.detach() + alpha * gradient.sign()).clamp(-epsilon, epsilon)
                delta = torch.max(torch.min(delta, 1 - x), -x)
            with torch.no_grad():
                good &= model(x + delta).argmax(1) == y
        robust.append(good)
    return torch.cat(robust)
