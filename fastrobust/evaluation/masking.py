"""Does a robust accuracy look real, or like gradients that mislead attacks (gradient masking)?

Checks after Athalye et al. (2018, "Obfuscated gradients give a false sense of security"), Carlini et al. (2019, "On
evaluating adversarial robustness") and Kim et al. (2021, "Understanding catastrophic overfitting"). Each gives a verdict
with its figures. All counts are of images; an attack's points count as `attack.verdicts.breaks` says.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust.attack.autoattack import Square
from fastrobust.attack.base import Setting
from fastrobust.attack.gradient import ascend, cross_entropy, frozen, input_gradient, margin
from fastrobust.attack.pgd import Pgd
from fastrobust.attack.rounds import run_rounds
from fastrobust.attack.threat import Threat, ball
from fastrobust.attack.verdicts import breaks, classified, correct, evaluating
from fastrobust.data.augment import to_unit
from fastrobust.data.sets import ImageSet
from fastrobust.runtime.errors import ConfigError

SINGLE_STEP_GAP = 0.20  # accuracy that one step may leave above many steps
SLACK = 0.05  # of the images may break under another attack though PGD did not break them; 3 images always may
NOISE = 0.02  # by which an accuracy may rise where it should fall, and what may be left at the largest radius
INTERIOR = 0.10  # of the images may be misclassified on the way to the single step's end and right again there
CHECKS = 8
STEPS, RESTARTS, QUERIES, NOISY_POINTS = 50, 3, 1000, 40


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    says: str
    figures: dict[str, Any]


class Subject:
    """A model and the images that it is checked on, in batches. Everything here is called in eval mode, frozen."""

    def __init__(self, model: nn.Module, data: ImageSet, threat: Threat, batch_size: int, seed: int):
        self.model, self.epsilon, self.batch_size, self.seed = model, threat.radius, batch_size, seed
        self.threat = threat
        device = next(model.parameters()).device
        self.images = data.images.to(device).contiguous(memory_format=torch.channels_last)
        self.x, self.y = to_unit(self.images), data.labels.to(device)
        self.n = len(self.y)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.clean = classified(model, self.images, self.y, batch_size)

    def few(self, mask: Tensor) -> bool:
        return mask.count_nonzero().item() <= max(3, SLACK * self.n)

    def map(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        parts = zip(*(t.split(self.batch_size) for t in tensors), strict=True)
        return torch.cat([function(*part) for part in parts])

    def share(self, mask: Tensor) -> float:
        return mask.count_nonzero().item() / self.n

    def uniform(self) -> Tensor:
        """Random perturbations, uniform in the ball."""
        return self.threat.noise(self.x.shape, self.generator).contiguous(memory_format=torch.channels_last)

    def edge(self, way: Tensor) -> Tensor:
        """The perturbations as far along `way` as the ball reaches: its corners, or points of its sphere."""
        return self.threat.step(torch.zeros_like(way), way, self.epsilon)

    def pgd(self, steps: int, restarts: int, epsilon: float | None = None, alpha: float | None = None) -> Tensor:
        """Which examples PGD leaves robust (bool, N), each point checked again."""
        threat = self.threat if epsilon is None else replace(self.threat, radius=epsilon)
        alpha, robust = threat.radius / 4 if alpha is None else alpha, self.clean.clone()
        setting = Setting(self.model, self.images, threat, alpha, self.batch_size, self.seed)
        run_rounds(Pgd(setting, (steps, restarts)), self.images, self.y, robust, threat=threat)
        return robust

    @cached_property
    def robust(self) -> Tensor:
        """What PGD leaves, as most checks compare with it."""
        return self.pgd(STEPS, RESTARTS)

    def gradient(self, x: Tensor, y: Tensor) -> Tensor:
        return input_gradient(self.model, x, y)[1]

    def broken_at(self, points: Tensor, which: Tensor) -> Tensor:
        """Which of the examples `which` (bool, N) break at these points (N x C x H x W, for all examples)."""
        check = lambda x, y, points: breaks(self.model, x, y, points, self.threat)
        return self.map(check, self.x, self.y, points) & which


def check_all(
    model: nn.Module,
    data: ImageSet,
    *,
    epsilon: float,
    batch_size: int,
    seed: int = 0,
    norm: str = "linf",
    surrogate: nn.Module | None = None,
    tell: Callable[[Check], None] = lambda check: None,
) -> list[Check]:
    """All checks, in order; `tell` hears of each when it is done. Without a surrogate, the transfer attack is left out.
    The model's mode and gradients are left as they are."""
    if epsilon <= 0:
        raise ConfigError("--sanity needs a radius above 0: --epsilon 8/255")
    found: list[Check] = []
    with evaluating(model):
        subject = Subject(model, data, ball(norm, epsilon), batch_size, seed)
        if not subject.clean.any():
            raise ConfigError(f"the model classifies none of the {subject.n} images correctly: there is nothing to check")
        other = [] if surrogate is None else [partial(transfer, surrogate=surrogate)]
        for check in (single_step, more_steps, growing_epsilon, random_points, black_box, *other, gradients, landscape):
            found.append(check(subject))
            tell(found[-1])
    return found


def verdict(checks: list[Check]) -> str:
    """`healthy` or `masked`."""
    return "healthy" if all(check.passed for check in checks) else "masked"


def not_run(checks: list[Check]) -> list[str]:
    """The names of the checks that could not be made here."""
    return [check.name for check in checks if check.figures.get("run") is False]


def single_step(s: Subject) -> Check:
    """Catastrophic overfitting: one large step is beaten, many small ones are not."""
    moved_from = lambda x, y, d, alpha: s.threat.project(s.threat.step(d, s.gradient(x + d, y), alpha), x)
    zero = s.map(lambda x, y: moved_from(x, y, torch.zeros_like(x), s.epsilon), s.x, s.y)
    start = s.threat.clip(s.uniform(), s.x)
    moved = s.map(lambda x, y, d: moved_from(x, y, d, 1.25 * s.epsilon), s.x, s.y, start)
    accuracy = {
        "fgsm_zero_start": s.share(s.clean & ~s.broken_at(s.x + zero, s.clean)),
        "fgsm_random_start": s.share(s.clean & ~s.broken_at(s.x + moved, s.clean)),
        "pgd": s.share(s.robust),
    }
    gap = max(accuracy["fgsm_zero_start"], accuracy["fgsm_random_start"]) - accuracy["pgd"]
    says = (
        f"one step leaves {accuracy['fgsm_zero_start']:.1%} (from the image) and {accuracy['fgsm_random_start']:.1%} (from "
        f"noise), PGD-{STEPS}-{RESTARTS} leaves {accuracy['pgd']:.1%}; the gap may be {SINGLE_STEP_GAP:.0%}"
    )
    return Check("single step", gap <= SINGLE_STEP_GAP, says, accuracy | {"gap": gap})


def more_steps(s: Subject) -> Check:
    """More steps, each shorter, never help the defender, and in the end change little."""
    accuracy = {k: s.share(s.pgd(k, 1, alpha=max(2.5 / k, 0.025) * s.epsilon)) for k in (1, 10, 50, 100)}
    values = list(accuracy.values())
    rises = max(b - a for a, b in itertools.pairwise(values))
    fall = values[-2] - values[-1]
    says = ", ".join(f"{k} steps {a:.1%}" for k, a in accuracy.items())
    says += f"; may rise by {NOISE:.0%}, and fall by {SLACK:.0%} at the end"
    return Check("more steps", rises <= NOISE and fall <= SLACK, says, {"accuracy": accuracy})


def growing_epsilon(s: Subject) -> Check:
    """Robust accuracy falls to 0 as the ball grows to the whole box."""
    radii, widest = [s.epsilon / 2], s.threat.widest(s.x.shape[1:])
    while radii[-1] < widest:
        radii.append(min(widest, 2 * radii[-1]))
    accuracy = {e: s.share(s.pgd(STEPS, 1, epsilon=e)) for e in radii}
    values = list(accuracy.values())
    rises = max(b - a for a, b in itertools.pairwise(values))
    says = ", ".join(f"{e:.3g}: {a:.1%}" for e, a in accuracy.items())
    says = f"accuracy by radius {says}; may rise by {NOISE:.0%}, and {NOISE:.0%} may be left at {widest:.4g}"
    return Check("growing epsilon", rises <= NOISE and values[-1] <= NOISE, says, {"accuracy": accuracy})


def random_points(s: Subject) -> Check:
    """Points drawn without the gradient, half of them in the ball and half at its corners or on its sphere."""
    left = s.clean.clone()
    for i in range(NOISY_POINTS):
        delta = s.uniform()
        delta = delta if i % 2 else s.edge(delta)
        left &= ~s.broken_at(s.x + s.threat.clip(delta, s.x), left)
    return no_better(s, "random points", f"{NOISY_POINTS} random points", left)


def black_box(s: Subject) -> Check:
    """Square, an attack that sees logits alone, on what PGD left."""
    try:
        Square.check(())
        square = Square(Setting(s.model, s.images, s.threat, 0.0, s.batch_size, s.seed))
    except ConfigError as error:
        return Check("black box", True, f"not run: {error}", {"run": False})
    square.attack.n_queries = QUERIES
    left = s.robust.clone()
    run_rounds(square, s.images, s.y, left, threat=s.threat)
    return no_better(s, "black box", f"square with {QUERIES} queries on what PGD left", left)


def transfer(s: Subject, surrogate: nn.Module) -> Check:
    """Adversarial examples of another model."""
    with frozen(surrogate):
        start = s.threat.clip(s.uniform(), s.x)
        points = s.map(lambda x, y, d: x + ascend(surrogate, x, y, d, s.threat, s.epsilon / 4, 20), s.x, s.y, start)
        fooled = correct(s.map(surrogate, s.x), s.y) & ~correct(s.map(surrogate, points), s.y)
    left = s.clean & ~s.broken_at(points, s.clean)
    check = no_better(s, "transfer", "adversarial examples of another model", left)
    says = f"{check.says} (they fool that model on {s.share(fooled):.1%})"
    return Check(check.name, check.passed, says, check.figures | {"surrogate_fooled": s.share(fooled)})


def no_better(s: Subject, name: str, attack: str, left: Tensor) -> Check:
    """Passed if an attack without the model's gradient breaks next to nothing that PGD did not."""
    beyond, accuracy = s.share(s.robust & ~left), s.share(left)
    says = f"{attack}: {accuracy:.1%} left; {beyond:.1%} of the images broke that PGD had left, {SLACK:.0%} may"
    return Check(name, s.few(s.robust & ~left), says, {"accuracy": accuracy, "beyond_pgd": beyond})


def gradients(s: Subject) -> Check:
    """What PGD left robust is not left for want of a gradient, nor because cross-entropy saturates."""
    start = s.threat.clip(s.uniform(), s.x)
    largest = lambda x, y, loss: input_gradient(s.model, x, y, loss)[1].abs().flatten(1).amax(1)
    at_image = s.map(lambda x, y: largest(x, y, cross_entropy), s.x, s.y)
    at_start = s.map(lambda x, y: largest(x, y, margin), s.x + start, s.y)
    stuck = s.robust & ~((at_start > 0) & at_start.isfinite())
    points = s.map(lambda x, y, d: x + ascend(s.model, x, y, d, s.threat, s.epsilon / 4, STEPS, margin), s.x, s.y, start)
    broken = s.broken_at(points, s.robust)
    figures = {
        "robust_without_gradient": s.share(stuck),
        "no_gradient_at_image": s.share(s.clean & (at_image == 0)),
        "median_largest": at_image[s.clean].median().item(),
        "margin_beyond_pgd": s.share(broken),
    }
    says = (
        f"{figures['robust_without_gradient']:.1%} of the images are robust and their logits have no gradient at a random "
        f"start, {SLACK:.0%} may (cross-entropy has none at {figures['no_gradient_at_image']:.1%} of the images; median of "
        f"its largest element {figures['median_largest']:.1e}); {figures['margin_beyond_pgd']:.1%} broke under a margin "
        f"loss that PGD had left, {SLACK:.0%} may"
    )
    return Check("gradients", s.few(stuck) and s.few(broken), says, figures)


def landscape(s: Subject) -> Check:
    """The loss on the way up the gradient and in a random direction, to the edge of the ball."""
    ways = {
        "gradient": s.edge(s.map(s.gradient, s.x, s.y)),
        "random": s.edge(s.uniform()),
    }
    shares = torch.linspace(0, 1, 11).tolist()
    figures: dict[str, Any] = {"share_of_epsilon": [round(t, 1) for t in shares]}
    for name, way in ways.items():
        delta = s.threat.clip(way, s.x)
        with torch.no_grad():
            logits = [s.map(lambda x, d: s.model(x + d).float(), s.x, t * delta) for t in shares]
        losses = torch.stack([cross_entropy(at, s.y) for at in logits])[:, s.clean]
        right = torch.stack([correct(at, s.y) for at in logits])
        figures[f"loss_{name}"] = losses.mean(1).tolist()
        figures[f"nonlinearity_{name}"] = nonlinearity(losses)
        figures[f"interior_{name}"] = s.share(s.clean & right[-1] & ~right.all(0))
    near = s.x + s.threat.clip(s.uniform(), s.x)
    align = lambda x, z, y: F.cosine_similarity(s.gradient(x, y).flatten(1), s.gradient(z, y).flatten(1))
    figures["gradient_alignment"] = s.map(align, s.x, near, s.y)[s.clean].mean().item()
    interior = figures["interior_gradient"]
    says = (
        f"{interior:.1%} of the images are misclassified on the way along the gradient and right again at its end, "
        f"{INTERIOR:.0%} may (random directions: {figures['interior_random']:.1%}); non-linearity "
        f"{figures['nonlinearity_gradient']:.2f} (random: {figures['nonlinearity_random']:.2f}); alignment of gradients "
        f"within the ball {figures['gradient_alignment']:.2f}"
    )
    return Check("landscape", interior <= INTERIOR, says, figures)


def nonlinearity(losses: Tensor) -> float:
    """The mean over examples of the largest distance between the loss and the straight line through its two ends, as a
    share of the loss's whole range: 0 for a line, 1 where the loss rises and comes all the way back. losses: points x N."""
    t = torch.linspace(0, 1, len(losses), device=losses.device)[:, None]
    line = losses[0] + t * (losses[-1] - losses[0])
    span = losses.amax(0) - losses.amin(0)
    return ((losses - line).abs().amax(0) / span.clamp(min=1e-12)).mean().item()


def train_surrogate(data: ImageSet, threat: Threat, classes: int, device: torch.device, seed: int = 0) -> nn.Module:
    """A small network trained for 2 passes on one-step adversarial examples of a quarter of the radius, which is little
    enough for it to learn something: a source of transfer attacks."""
    quarter = replace(threat, radius=threat.radius / 4)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(data.images.shape[1], 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * 16, classes),
        ).to(device)  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(2):
            for index in torch.randperm(len(data.labels)).split(50):
                x, y = to_unit(data.images[index].to(device)), data.labels[index].to(device)
                with frozen(model):
                    delta = ascend(model, x, y, quarter.start(x), quarter, quarter.radius, 1)
                optimizer.zero_grad()
                F.cross_entropy(model(x + delta), y).backward()
                optimizer.step()
    return model.eval()
