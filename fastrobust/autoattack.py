"""AutoAttack's four parts (Croce & Hein, 2020) as attacks that `attacks.sweep` can run, from the authors' package.

The package's own `standard` version sets every hyperparameter; batching, the choice of examples, seeds, progress and the
judgement of what was found are ours.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastrobust.attacks import correct
from fastrobust.errors import ConfigError

PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
TARGETS = 9  # rival classes that the targeted parts try, most likely first
PASSES = {"apgd-ce": 102, "apgd-t": 103 * TARGETS, "fab-t": 206 * TARGETS, "square": 5001}  # forward passes, at most


def version() -> str:
    """The installed version of the package. ConfigError if there is none."""
    try:
        return f"pyautoattack {importlib.metadata.version('pyautoattack')}"
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError("AutoAttack's attacks need a package: pip install 'fastrobust[autoattack]'") from None


class Part:
    """One part, in one round. `tick(share)`, if set, hears which share of a batch's work is done, now and then."""

    rounds = 1

    def __init__(self, name: str, model: nn.Module, *, classes: int, epsilon: float, batch_size: int, seed: int):
        version()
        if classes < 4 and name in ("apgd-t", "fab-t"):
            raise ConfigError(f"{name} needs at least 4 classes, the model has {classes}: --attack pgd-50-10,apgd-ce,square")
        from pyautoattack import AutoAttack

        logging.getLogger("auto-attack").setLevel(logging.ERROR)
        self.name, self.model, self.batch_size, self.seed = name, model, batch_size, seed
        self.passes, self.tick = 0, lambda share: None
        whole = AutoAttack(self._forward, eps=epsilon, norm="Linf", version="standard", seed=seed, device=None)
        whole.apgd.loss = "ce"
        whole.fab.targeted = True
        whole.apgd_targeted.n_target_classes = whole.fab.n_target_classes = min(TARGETS, classes - 1)
        parts = {"apgd-ce": whole.apgd, "apgd-t": whole.apgd_targeted, "fab-t": whole.fab, "square": whole.square}
        self.attack = parts[name]

    def _forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.tick(min(1.0, self.passes / PASSES[self.name]))
        return self.model(x).float()

    def batches(self, number: int, alive: Tensor) -> Iterator[tuple[Tensor, int]]:
        """(indices, batch number) of the examples that are alive."""
        return ((index, batch) for batch, index in enumerate(alive.nonzero()[:, 0].split(self.batch_size)) if len(index))

    def run(self, x: Tensor, y: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Which examples survived (bool, N), and the points that the attack came to."""
        self.passes, self.attack.device = 0, x.device
        self.attack.seed = (self.seed + 1009 * start) % 2**31
        x = x.contiguous()
        with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
            points = self.attack.perturb(x.clone(), y.clone()).detach()
        with torch.no_grad():
            return correct(self.model(points), y), points
