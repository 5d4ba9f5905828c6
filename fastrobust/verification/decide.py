"""Is the class of an image the same everywhere within epsilon? Bounds first, an attack second, then the search. Each answer
is a `Verdict`; nothing is left out.

`verified`: every margin is proved to exceed 1e-4 everywhere in the box, for the network in exact arithmetic with the
weights as stored. Bounds are computed in double precision and widened by 1e-9 wherever they enter the next layer; 1e-4 is
far above what is lost in double precision and what a forward pass in single precision adds (tests measure both).
`falsified`: an image in single precision, within epsilon and [0, 1] without any tolerance, that a plain forward pass in
single precision and one in double precision both misclassify. `timeout`: neither, within the time given.
"""

import contextlib
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fastrobust.attack import gradient
from fastrobust.attack.threat import Threat
from fastrobust.attack.verdicts import classified, correct, evaluating
from fastrobust.verification import bounds, branch, search
from fastrobust.verification.lowering import lower_model
from fastrobust.verification.network import DTYPE, Network
from fastrobust.verification.reduced import TooLarge
from fastrobust.verification.squares import Squares

INSIDE = 1 - 1e-6  # searches use this part of epsilon, so that rounding to single precision stays within epsilon


@dataclass
class Verdict:
    """verdict: misclassified, verified, falsified or timeout. by: what decided it. domains: branches visited. witness: the
    adversarial image, float32 C x H x W in [0, 1]."""

    index: int
    label: int
    verdict: str
    by: str
    seconds: float = 0.0
    domains: int = 0
    witness: Tensor | None = None


class Decider:
    """Decides images of one shape (C x H x W) for one model in eval mode on the CPU. network: the model's, if known.
    device: where branch and bound works."""

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        epsilon: float,
        network: Network | None = None,
        device: torch.device = search.CPU,
    ):
        self.model, self.epsilon, self.shape, self.device = model, epsilon, shape, device
        self.inside = Threat(epsilon * INSIDE)
        self.network = lower_model(model, shape) if network is None else network
        classes = np.eye(len(self.network.outputs.shift))
        self.asked = [self.network.outputs.rows(own - np.delete(classes, k, 0)) for k, own in enumerate(classes)]

    def look(self, indices: list[int], images: Tensor, labels: Tensor, timeout: float) -> list[Verdict | None]:
        """What the forward pass, plain bounds and attacks say of many images at once, fast; None for the images that they
        leave open. images: uint8 N x C x H x W. timeout: seconds for the bounds of one image."""
        x, began = images.float() / 255, time.monotonic()
        verdicts: list[Verdict | None] = [None] * len(x)

        def settle(rows: Tensor, verdict: str, by: str, witnesses: Tensor | None = None) -> None:
            for i in rows.nonzero()[:, 0].tolist():
                witness = None if witnesses is None else witnesses[i]
                verdicts[i] = Verdict(indices[i], int(labels[i]), verdict, by, witness=witness)

        clean = classified(self.model, images, labels)
        settle(~clean, "misclassified", "forward pass")
        proved = torch.zeros_like(clean)
        for i in clean.nonzero()[:, 0].tolist():
            with contextlib.suppress(TooLarge):
                least, *_ = self.margins(x[i], labels[i], 0, time.monotonic() + timeout)
                proved[i] = (least > branch.TOLERANCE).all()
        settle(proved, "verified", "bounds")
        open_ = (clean & ~proved).nonzero()[:, 0]
        if len(open_):
            found = torch.zeros_like(x)
            broken = torch.zeros_like(clean)
            broken[open_], found[open_] = self.attack(x[open_], labels[open_])
            settle(broken, "falsified", "attack", found)
        for verdict in verdicts:
            if verdict is not None:
                verdict.seconds = round((time.monotonic() - began) / len(x), 4)
        return verdicts

    def margins(
        self, x: Tensor, label: Tensor, steps: int, deadline: float = math.inf
    ) -> tuple[Tensor, bounds.Bounder, Tensor]:
        """(lower bounds on logit[label] - logit[other] for every other class in order; the bounder around the image x,
        C x H x W in [0, 1]; the questions of the margins)."""
        low, high = ((x.to(DTYPE) + side).clamp(0, 1).flatten() for side in (-self.epsilon, self.epsilon))
        return search.margins(self.network, (low, high), self.asked[int(label)], steps, deadline)

    def confirmed(self, x: Tensor, label: Tensor, points: Tensor) -> Tensor:
        """Which points (float32 N x C x H x W) are adversarial for the image x beyond doubt: the second check of everything
        that is called falsified."""
        with torch.no_grad():
            broken = ~correct(self.model(points), label)
            if broken.any():
                broken &= ((points.to(DTYPE) - x.to(DTYPE)).abs() <= self.epsilon).flatten(1).all(1)
                broken &= ((points >= 0) & (points <= 1)).flatten(1).all(1)
                broken &= ~correct(self.network(points), label)
        return broken

    def attack(
        self,
        x: Tensor,
        labels: Tensor,
        targets: Tensor | None = None,
        steps: int = 50,
        restarts: int = 3,
        deadline: float = math.inf,
    ) -> tuple[Tensor, Tensor]:
        """PGD on the cross-entropy, or on the margin to `targets` (int64 N), until the deadline: (which were broken, with
        what), confirmed."""
        generator = torch.Generator().manual_seed(0)
        threat, alpha = self.inside, max(self.epsilon / 10, 1e-4)
        loss = gradient.cross_entropy if targets is None else gradient.margin_to(targets)
        broken, found = torch.zeros(len(x), dtype=torch.bool), torch.zeros_like(x)

        def look(logits: Tensor, points: Tensor) -> None:
            wrong = (logits.argmax(1) != labels) & ~broken
            for i in wrong.nonzero()[:, 0].tolist():
                if self.confirmed(x[i], labels[i : i + 1], points[i : i + 1]).item():
                    broken[i], found[i] = True, points[i]

        with evaluating(self.model):
            for _ in range(restarts):
                delta = (torch.rand(x.shape, generator=generator) * 2 - 1) * threat.radius
                delta = threat.project(delta, x)
                for _ in range(steps):
                    points = x + delta
                    logits, delta = gradient.step(self.model, x, labels, delta, threat, alpha, loss)
                    look(logits, points)
                    if broken.all() or time.monotonic() > deadline:
                        return broken, found
                with torch.no_grad():
                    look(self.model(x + delta), x + delta)
                if broken.all():
                    return broken, found
        return broken, found

    def search(self, index: int, image: Tensor, label: Tensor, timeout: float) -> Verdict:
        """One image (uint8 C x H x W) that `look` leaves open. timeout: seconds."""
        x, began = image.float() / 255, time.monotonic()
        deadline = began + timeout
        classes = torch.arange(len(self.network.outputs.shift))
        others = classes[classes != label]

        def attack(todo: Tensor) -> Tensor:
            targets = others[todo].repeat_interleave(5)
            many = x.expand(len(targets), *x.shape)
            options = {"steps": 50, "restarts": 2, "deadline": deadline}
            broken, points = self.attack(many, label.expand(len(targets)), targets, **options)
            return points[broken]

        low, high = ((x + side).clamp(0, 1) for side in (-self.inside.radius, self.inside.radius))

        def margin(points: Tensor, goals: Tensor) -> Tensor:
            return -gradient.margin_to(goals)(self.model(points).float(), label.expand(len(points)))

        squares = Squares(margin, low, high, others)

        def another(todo: Tensor) -> Tensor:
            with evaluating(self.model), torch.no_grad():
                point = squares.follow(todo.tolist())
            return x[None][:0] if point is None or not confirmed(point[None]).item() else point[None]

        def rounded(pixels: Tensor) -> Tensor:
            inner = (pixels.reshape(-1, *self.shape) - x.to(DTYPE)).clamp(-self.epsilon * INSIDE, self.epsilon * INSIDE)
            return (x.to(DTYPE) + inner).clamp(0, 1).float()

        def confirmed(points: Tensor) -> Tensor:
            return self.confirmed(x, label.expand(len(points)), points)

        try:
            bounded = self.margins(x, label, 20, deadline)
            found = search.decide(*bounded, deadline, attack, rounded, confirmed, another, self.device)
        except TooLarge:
            found = search.Found(search.OPEN, "too many open ReLUs")
        seconds = round(time.monotonic() - began, 4)
        kind = {search.HOLDS: "verified", search.FAILS: "falsified", search.OPEN: "timeout"}[found.answer]
        return Verdict(index, int(label), kind, found.by, seconds, found.domains, found.witness)
