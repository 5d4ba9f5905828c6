"""A training method as a function, and the same training written out slowly: a leaf delta, plain `backward` calls, plain
torch.optim and loops over pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust.attack.threat import Threat
from fastrobust.config import reading
from fastrobust.train.learner import Learner
from fastrobust.train.methods.base import Inputs, Method, Scale, Shapes
from fastrobust.train.optimizers import Sgd

EPSILON, LR, MOMENTUM, DECAY = 0.1, 0.5, 0.9, 5e-4


def section(name: str, epsilon: float = EPSILON, **keys) -> Method:
    """The resolved `method` section of a config."""
    return reading.parse(
        {
            "name": "test",
            "epsilon": epsilon,
            "data": {"dataset": "mnist"},
            "model": {"name": "mnist_net"},
            "method": {"name": name, **keys},
            "optimizer": {"name": "sgd"},
            "schedule": {"name": "cyclic", "max_lr": 0.1},
            "phases": [{"epochs": 1, "batch_size": 1}],
        },
        "test",
    ).method


class Watched:
    """A learner; `x` is what it was updated with last."""

    def __init__(self, learner: Learner):
        self.attack_gradient, self.model, self.learner = learner.attack_gradient, learner.model, learner
        self.loss = learner.loss

    def update(self, x: Tensor, *rest) -> None:
        self.x = x
        self.learner.update(x, *rest)

    def update_with_input_gradient(self, x: Tensor, y: Tensor) -> Tensor:
        self.x = x
        return self.learner.update_with_input_gradient(x, y)


def shapes_of(x: Tensor) -> Shapes:
    return Shapes(tuple(x.shape), 3, 100, x.device)


def as_function(method: Method, threat: Threat, scale: Scale = 1.0):
    """A method's step as a function of (learner, x, y, delta), delta being what the minibatch before left. It gives the
    perturbation that it keeps, or else the one of the images that the weights were updated with."""

    def take(learner: Learner, x: Tensor, y: Tensor, delta: Tensor) -> Tensor:
        watched, state = Watched(learner), {name: delta.clone() for name in method.state(shapes_of(x))}
        method.step(watched, Inputs(x, y, torch.arange(len(x))), threat, scale, state)
        return state["delta"] if state else watched.x - x

    return take


def step(name: str, epsilon: float = EPSILON, scale: Scale = 1.0, **keys):
    """`as_function` of a config's `method` section."""
    return as_function(section(name, epsilon, **keys), Threat(epsilon), scale)


def make_model(seed: int = 0) -> nn.Module:
    """2 x 6 x 6 images, 3 classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))


def make_learner(model: nn.Module, updates: int = 20) -> Learner:
    return Learner(model, Sgd(name="sgd", momentum=MOMENTUM, weight_decay=DECAY), torch.full((updates,), LR))


def make_batch(n: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images with saturated pixels, random labels."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(n, 2, 6, 6, generator=generator) * 1.4 - 0.2).clamp(0, 1)
    return x, torch.randint(3, (n,), generator=generator)


def written_out_bound(model: nn.Module, x: Tensor, epsilon: float) -> Tensor:
    """Interval bounds of the network of make_model, by positive and negative weights, N x label x class."""
    low, high = (x - epsilon).clamp(0, 1), (x + epsilon).clamp(0, 1)
    for layer in list(model)[:-1]:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            apply = F.conv2d if isinstance(layer, nn.Conv2d) else F.linear
            up, down = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
            low, high = apply(low, up, layer.bias) + apply(high, down), apply(high, up, layer.bias) + apply(low, down)
        else:
            low, high = layer(low), layer(high)
    rows, shift = (p[None] - p[:, None] for p in (model[-1].weight, model[-1].bias))
    return (rows.clamp(min=0) * high[:, None, None] + rows.clamp(max=0) * low[:, None, None]).sum(-1) + shift


class Slow:
    """The same training, written out: a leaf delta, `loss.backward()` with all weight gradients, loops over pixels."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY, foreach=False, fused=False
        )

    def attack_gradient(self, x: Tensor, y: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        leaf = delta.clone().requires_grad_()
        logits = self.model(x + leaf)
        F.cross_entropy(logits, y).backward()
        self.optimizer.zero_grad()
        return leaf.grad, logits.argmax(1)

    def update(self, x: Tensor, y: Tensor, bound: Tensor | float = 0.0, weight: float = 0.0) -> None:
        self.optimizer.zero_grad()
        ((1 - weight) * F.cross_entropy(self.model(x), y) + weight * bound).backward()
        self.optimizer.step()

    def replay(self, x: Tensor, y: Tensor, delta: Tensor) -> Tensor:
        leaf = delta.clone().requires_grad_()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x + leaf), y).backward()
        self.optimizer.step()
        return leaf.grad


def per_pixel(rule, *tensors: Tensor) -> Tensor:
    """rule applied to the Python floats of each pixel."""
    rows = zip(*(t.flatten().tolist() for t in tensors), strict=True)
    return torch.tensor([rule(*row) for row in rows]).view_as(tensors[0])


def sign(value: float) -> int:
    return (value > 0) - (value < 0)


def clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def into_ball_and_box(d: float, x: float) -> float:
    return clamp(clamp(d, -EPSILON, EPSILON), -x, 1 - x)


def into_box(d: float, x: float) -> float:
    return clamp(d, -x, 1 - x)


def noise(x: Tensor, radius: float) -> Tensor:
    return per_pixel(lambda u, p: into_box((2 * u - 1) * radius, p), torch.rand_like(x), x)


def same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


class Counted(nn.Module):
    """A network that counts its forward and backward passes and remembers its inputs."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.forwards, self.backwards, self.inputs = network, 0, 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        self.inputs.append(x.detach().clone())
        logits = self.network(x)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.backwards += 1
