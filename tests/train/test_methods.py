"""Tests of fastrobust.methods: each training step against a slow version with a leaf delta, plain `backward` calls,
plain torch.optim and pixel-by-pixel loops; and the costs and traps that the modules' comments speak of."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastrobust.config import reading, schema
from fastrobust.train import methods
from fastrobust.train.learner import Learner

EPSILON, LR, MOMENTUM, DECAY = 0.1, 0.5, 0.9, 5e-4


def section(name: str, epsilon: float = EPSILON, **keys):
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


def step(name: str, epsilon: float = EPSILON, scale: float | Tensor = 1.0, **keys):
    """The step of a config's `method` section, as a function of (learner, x, y, delta)."""
    found = methods.from_config(section(name, epsilon, **keys), epsilon)
    return lambda learner, x, y, delta: found(learner, x, y, delta, scale)


def make_model(seed: int = 0) -> nn.Module:
    """2 x 6 x 6 images, 3 classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))


def make_learner(model: nn.Module, updates: int = 20) -> Learner:
    return Learner(model, schema.Sgd(name="sgd", momentum=MOMENTUM, weight_decay=DECAY), torch.full((updates,), LR))


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


# ---- each method against its slow version


def test_standard():
    model, reference = make_model(), Slow(make_model())
    x, y = make_batch()
    kept = torch.full_like(x, 0.01)
    learner = make_learner(model)
    for _ in range(3):
        assert step("standard")(learner, x, y, kept) is kept
        reference.update(x, y)
    same_weights(model, reference.model)


@pytest.mark.parametrize("init", ["zero", "random", "previous"])
@pytest.mark.parametrize("alpha", [0.04, 0.125])
def test_fgsm(init, alpha):
    model, reference = make_model(), Slow(make_model())
    learner = make_learner(model)
    x, y = make_batch()
    kept = 0.3 * (torch.rand(x.shape, generator=torch.Generator().manual_seed(9)) - 0.5)  # partly outside ball and box
    torch.manual_seed(5)
    found = step("fgsm", init=init, alpha=alpha)(learner, x, y, kept)

    torch.manual_seed(5)
    delta = {"zero": torch.zeros_like(x), "previous": per_pixel(into_box, kept, x)}.get(init)
    delta = noise(x, EPSILON) if delta is None else delta
    gradient, _ = reference.attack_gradient(x, y, delta)
    delta = per_pixel(lambda d, g, p: into_ball_and_box(d + alpha * sign(g), p), delta, gradient, x)
    reference.update(x + delta, y)
    close(found, delta)
    same_weights(model, reference.model)


def test_fgsm_alpha_defaults_to_five_quarters_of_epsilon():
    x = torch.full((2, 2, 6, 6), 0.5)
    for epsilon in (0.1, 0.2):
        method = section("fgsm", epsilon, init="zero")
        fgsm = methods.from_config(method, 10.0)  # so large a ball that nothing is clipped
        found = fgsm(make_learner(make_model()), x, torch.tensor([0, 1]), x, 1.0)
        moved = found[found != 0]
        close(moved.abs(), torch.full_like(moved, 1.25 * epsilon))
        assert len(moved) > 100


@pytest.mark.parametrize("scale", [1.0, torch.tensor(0.5)], ids=["number", "tensor"])
def test_fgsm_with_an_interval_bound(scale):
    """Its radius is that of the attack, and grows with it."""
    model, reference = make_model(), Slow(make_model())
    learner = make_learner(model)
    for seed in range(3):
        x, y = make_batch(seed=seed)
        torch.manual_seed(seed)
        step("fgsm", init="zero", alpha=0.04, ibp_weight=0.3, scale=scale)(learner, x, y, x)
        gradient, _ = reference.attack_gradient(x, y, torch.zeros_like(x))
        delta = per_pixel(lambda g, p: into_ball_and_box(0.04 * scale * sign(g), p), gradient, x)
        bound = written_out_bound(reference.model, x, EPSILON * scale)[torch.arange(len(y)), y]
        reference.update(x + delta, y, F.cross_entropy(bound, y), 0.3)
    same_weights(model, reference.model)
    assert learner.read_sums()[0] > 0 and learner.updates.item() == 3


def test_previous_starts_from_the_last_delta():
    """Over three minibatches, handing on what each step returns."""
    model, reference = make_model(), Slow(make_model())
    learner, fgsm = make_learner(model), step("fgsm", init="previous", alpha=0.06)
    found = delta = torch.zeros(6, 2, 6, 6)
    for seed in range(3):
        x, y = make_batch(seed=seed)
        found = fgsm(learner, x, y, found)
        delta = per_pixel(into_box, delta, x)
        gradient, _ = reference.attack_gradient(x, y, delta)
        delta = per_pixel(lambda d, g, p: into_ball_and_box(d + 0.06 * sign(g), p), delta, gradient, x)
        reference.update(x + delta, y)
    close(found, delta)
    same_weights(model, reference.model)
    inner = ((found.abs() - 0.06).abs() > 1e-4) & ((found.abs() - EPSILON).abs() > 1e-4) & (found != 0)
    assert inner.any()  # sums of several steps: not one step from zero


def test_n_fgsm():
    model, reference = make_model(), Slow(make_model())
    learner = make_learner(model)
    x, y = make_batch(12)
    torch.manual_seed(6)
    found = step("n_fgsm")(learner, x, y, torch.zeros_like(x))

    torch.manual_seed(6)
    delta = noise(x, 2 * EPSILON)
    gradient, _ = reference.attack_gradient(x, y, delta)
    delta = per_pixel(lambda d, g, p: into_box(d + EPSILON * sign(g), p), delta, gradient, x)
    reference.update(x + delta, y)
    close(found, delta)
    same_weights(model, reference.model)


def test_n_fgsm_is_clipped_to_the_box_but_not_to_the_ball():
    torch.manual_seed(7)
    x, y = make_batch(60)
    found = step("n_fgsm")(make_learner(make_model()), x, y, torch.zeros_like(x))
    assert found.abs().max() <= 3 * EPSILON + 1e-6
    assert found.abs().max() > 2.9 * EPSILON and (found.abs() > EPSILON).float().mean() > 0.3
    assert (x + found).min() >= 0 and (x + found).max() <= 1
    wide = step("n_fgsm", noise=0.5, alpha=0.01)(make_learner(make_model()), x, y, torch.zeros_like(x))
    assert 0.055 < wide.abs().max() <= 0.06 + 1e-6


@pytest.mark.parametrize("init", ["zero", "random"])
@pytest.mark.parametrize("skip", [False, True])
def test_pgd(init, skip):
    model, reference = make_model(), Slow(make_model())
    learner, pgd = make_learner(model), step("pgd", steps=3, alpha=0.04, init=init, skip_misclassified=skip)
    x, y = make_batch(16, seed=3)
    for _ in range(6):  # some examples must be right, some wrong
        standard = step("standard")
        standard(learner, x, y, x)
        reference.update(x, y)
    torch.manual_seed(8)
    found = pgd(learner, x, y, torch.zeros_like(x))

    torch.manual_seed(8)
    delta = noise(x, EPSILON) if init == "random" else torch.zeros_like(x)
    stayed = 0
    for _ in range(3):
        gradient, predicted = reference.attack_gradient(x, y, delta)
        for i in range(len(x)):
            if skip and predicted[i] != y[i]:
                stayed += 1
                continue
            delta[i] = per_pixel(lambda d, g, p: into_ball_and_box(d + 0.04 * sign(g), p), delta[i], gradient[i], x[i])
    reference.update(x + delta, y)
    assert not skip or 3 < stayed < 45
    close(found, delta)
    same_weights(model, reference.model)


def test_free_is_algorithm_2():
    """Over two minibatches: delta goes on from one replay, and one minibatch, to the next; every replay updates."""
    model, reference = make_model(), Slow(make_model())
    learner, free = make_learner(model), step("free", replays=3)
    found = delta = torch.zeros(6, 2, 6, 6)
    for seed in range(2):
        x, y = make_batch(seed=seed)
        found = free(learner, x, y, found)
        for _ in range(3):
            delta = per_pixel(into_box, delta, x)
            gradient = reference.replay(x, y, delta)
            delta = per_pixel(lambda d, g, p: into_ball_and_box(d + EPSILON * sign(g), p), delta, gradient, x)
    close(found, delta)
    same_weights(model, reference.model)
    assert learner.updates.item() == 6


def test_free_depends_on_the_delta_it_is_given():
    x, y = make_batch()
    learner = make_learner(make_model())
    other = make_learner(make_model())
    step("free", replays=1)(learner, x, y, torch.zeros_like(x))
    step("free", replays=1)(other, x, y, torch.full_like(x, 0.05))
    assert not torch.equal(learner.model[0].weight, other.model[0].weight)


@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    ("name", "keys", "smaller"),
    [
        ("fgsm", {"alpha": 0.08}, {"alpha": 0.02}),
        ("fgsm", {"init": "previous", "alpha": 0.08}, {"init": "previous", "alpha": 0.02}),
        ("n_fgsm", {}, {}),
        ("pgd", {"steps": 2, "alpha": 0.04}, {"steps": 2, "alpha": 0.01}),
        ("free", {"replays": 2}, {"replays": 2}),
        ("standard", {}, {}),
    ],
)
def test_the_scale_multiplies_epsilon_and_alpha(name, keys, smaller, scale):
    """A step at a scale of 1/4 is the step of a config with a quarter of epsilon and alpha."""
    models, found = [make_model(), make_model()], []
    x, y = make_batch()
    kept = torch.full_like(x, 0.02)
    for model, method in zip(models, [step(name, 0.1, scale, **keys), step(name, 0.025, **smaller)], strict=True):
        torch.manual_seed(11)
        found.append(method(make_learner(model), x, y, kept))
    close(found[0], found[1])
    same_weights(*models)
    assert 0 < found[0].abs().max() <= 0.075 + 1e-6


# ---- how many passes, and what they cost


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


@pytest.mark.parametrize(
    ("name", "keys", "passes", "updates"),
    [
        ("standard", {}, 1, 1),
        ("fgsm", {}, 2, 1),
        ("n_fgsm", {}, 2, 1),
        ("pgd", {"steps": 5, "alpha": 0.02}, 6, 1),
        ("free", {"replays": 4}, 4, 4),
    ],
)
def test_number_of_passes(name, keys, passes, updates):
    """Trap of `free`: it is only free if one backward pass serves both the weights and delta."""
    model = Counted(make_model())
    learner = make_learner(model)
    x, y = make_batch()
    step(name, **keys)(learner, x, y, torch.zeros_like(x))
    assert (model.forwards, model.backwards, learner.updates.item()) == (passes, passes, updates)


@pytest.mark.parametrize("name", ["fgsm", "n_fgsm", "pgd", "free"])
def test_the_model_only_ever_sees_pixels_in_the_box(name):
    model = Counted(make_model())
    keys = {"steps": 3, "alpha": 0.05} if name == "pgd" else {}
    x, y = make_batch(20)
    step(name, **keys)(make_learner(model), x, y, torch.full_like(x, 0.1))
    for seen in model.inputs:
        assert seen.min() >= 0 and seen.max() <= 1
    assert any(not torch.equal(seen, x) for seen in model.inputs)


@pytest.mark.parametrize("name", ["fgsm", "n_fgsm", "pgd"])
def test_the_weights_learn_from_the_final_perturbation(name):
    model = Counted(make_model())
    keys = {"steps": 3, "alpha": 0.05} if name == "pgd" else {}
    x, y = make_batch()
    delta = step(name, **keys)(make_learner(model), x, y, torch.zeros_like(x))
    assert torch.equal(model.inputs[-1], x + delta)


CONVNET = [(3, 16), (16, 16), (16, 32), (32, 32)]


class ConvNet(nn.Module):
    """FlopCounterMode's module hooks refuse inputs that are leaves under autograd.grad: no hook sees this module, and
    its children see x + 0."""

    def __init__(self):
        super().__init__()
        layers = []
        for inputs, outputs in CONVNET:
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

    def __call__(self, x: Tensor) -> Tensor:
        return self.network(x + 0)


def flops(action) -> int:
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def test_the_attack_computes_no_weight_gradients():
    """Forward, input gradients, weight gradients: F each (the update needs no gradient of the first layer's input, f).
    Standard 3F - f; FGSM 2F more; a version with weight gradients in its attack 3F more."""
    n, side = 4, 8
    layers = [2 * n * side * side * 9 * a * b for a, b in CONVNET] + [2 * n * 32 * 10]
    forward, first = sum(layers), layers[0]
    x, y = torch.rand(n, 3, side, side), torch.randint(10, (n,))
    learner = make_learner(ConvNet())
    standard = flops(lambda: step("standard")(learner, x, y, x))
    fgsm = flops(lambda: step("fgsm")(learner, x, y, x))

    def wasteful():
        leaf = torch.zeros_like(x).requires_grad_()
        F.cross_entropy(learner.model(x + leaf), y).backward()
        learner.update(x + EPSILON * leaf.grad.sign(), y)

    assert standard == 3 * forward - first
    assert fgsm - standard == 2 * forward
    assert 1.5 < fgsm / standard < 1.72
    assert flops(wasteful) / standard > 1.95
    pgd = flops(lambda: step("pgd", steps=3, alpha=0.05)(learner, x, y, x))
    assert pgd - standard == 3 * 2 * forward
    free = flops(lambda: step("free", replays=2)(learner, x, y, x))
    assert free == 2 * 3 * forward


def test_input_gradient_leaves_weight_gradients_alone():
    model = make_model()
    model[3].bias.requires_grad_(False)
    learner = make_learner(model)
    x, y = make_batch()
    learner.input_gradient(x, y)
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False, True, True]
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0) if p.requires_grad else None
    learner.input_gradient(x, y)
    assert all((p.grad == 7).all() for p in model.parameters() if p.requires_grad)
    assert x.grad is None and not x.requires_grad


def test_weights_ask_for_gradients_again_after_a_failed_attack():
    model = make_model()
    with pytest.raises(RuntimeError):  # 5 channels where there must be 2
        make_learner(model).input_gradient(torch.rand(2, 5, 6, 6), torch.tensor([0, 1]))
    assert all(p.requires_grad for p in model.parameters())


def test_deltas_are_cut_from_the_graph():
    learner = make_learner(make_model())
    x, y = make_batch()
    for name, keys in [("fgsm", {}), ("n_fgsm", {}), ("pgd", {"alpha": 0.02, "steps": 2}), ("free", {"replays": 2})]:
        delta = step(name, **keys)(learner, x, y, torch.zeros_like(x))
        assert not delta.requires_grad and delta.shape == x.shape, name


# ---- traps


class Linear(nn.Module):
    """logits = W x, with no weight near zero: every pixel has a gradient."""

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.rand(3, 72, generator=generator) + 0.1
        weight = weight * torch.randint(0, 2, weight.shape, generator=generator).mul(2).sub(1)
        self.weight = nn.Parameter(weight * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def test_saturated_pixels_have_a_gradient_and_move_inwards():
    """Trap 5: a clamp inside the differentiated graph gives the pixels whose noise points outwards no gradient."""
    model = Linear()
    x = torch.randint(0, 2, (40, 2, 6, 6), generator=torch.Generator().manual_seed(1)).float()
    y = torch.arange(40) % 3
    probabilities = model(x).softmax(1)
    exact = ((probabilities - F.one_hot(y, 3)) @ model.weight / 40).view_as(x).detach()
    gradient, _ = make_learner(model).input_gradient(x, y)
    torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-8)
    assert (gradient != 0).all()

    inwards = exact.sign() == 1 - 2 * x  # where the loss rises towards the inside
    found = step("fgsm", init="zero", alpha=0.08)(make_learner(Linear()), x, y, torch.zeros_like(x))
    close(found, torch.where(inwards, 0.08 * exact.sign(), torch.zeros_like(x)))
    assert 0.3 < inwards.float().mean() < 0.7
    torch.manual_seed(2)
    found = step("fgsm", alpha=0.08)(make_learner(Linear()), x, y, torch.zeros_like(x))
    torch.manual_seed(2)
    raw = (2 * torch.rand_like(x) - 1) * EPSILON
    moved = inwards & (found.abs() >= 0.08 - 1e-6)
    assert moved.sum() > 0.99 * inwards.sum()  # the gradient at x + noise has the same sign but for a few

    leaf = raw.clone().requires_grad_()  # the published way, to see that the trap is there
    F.cross_entropy(model(torch.clamp(x + leaf, 0, 1)), y).backward()
    outwards = raw.sign() == 2 * x - 1
    assert (leaf.grad[outwards] == 0).all() and outwards.float().mean() > 0.4


class Hill(nn.Module):
    """Two classes, logits 0 and -20 (x - 0.5)^2 summed over the pixels: for class 0 the loss rises towards x = 0.5."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        hill = -20 * (x.flatten(1) - 0.5).square().sum(1) + self.offset
        return torch.stack([torch.zeros_like(hill), hill], 1)


@pytest.mark.parametrize(("steps", "end"), [(1, 0.15), (2, 0.0), (3, 0.15), (4, 0.0)])
def test_pgd_gradients_are_fresh_in_every_step(steps, end):
    """Trap 6. From x = 0.4 the first step leads over the top, to 0.55, where the gradient has the other sign and half
    the size: fresh gradients lead back, accumulated ones on to 0.7."""
    x = torch.full((1, 1, 1, 1), 0.4)
    learner = Learner(Hill(), schema.Sgd(name="sgd"), torch.zeros(4))
    pgd = step("pgd", epsilon=0.3, alpha=0.15, steps=steps, init="zero")
    close(pgd(learner, x, torch.tensor([0]), torch.zeros_like(x)), torch.full_like(x, end))


def test_input_gradient_does_not_accumulate():
    learner = make_learner(make_model())
    x, y = make_batch()
    first, _ = learner.input_gradient(x, y)
    again, _ = learner.input_gradient(x, y)
    assert torch.equal(first, again) and first.abs().sum() > 0


def test_skip_misclassified_leaves_wrong_examples_at_their_start():
    """A model that calls everything class 0: examples of the other classes do not move, unless skipping is off."""

    class Zero(Linear):
        def forward(self, x):
            return super().forward(x) * 0.01 + torch.tensor([5.0, 0.0, 0.0])

    x = torch.full((6, 2, 6, 6), 0.5)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    torch.manual_seed(3)
    found = step("pgd", steps=4, alpha=0.05, skip_misclassified=True)(make_learner(Zero()), x, y, torch.zeros_like(x))
    torch.manual_seed(3)
    begin = noise(x, EPSILON)
    close(found[y != 0], begin[y != 0])
    close(found[y == 0].abs(), torch.full_like(found[y == 0], EPSILON))
    moved = step("pgd", steps=4, alpha=0.05)(make_learner(Zero()), x, y, torch.zeros_like(x))
    close(moved.abs(), torch.full_like(moved, EPSILON))


def test_random_starts_differ_from_step_to_step():
    torch.manual_seed(4)
    x, y = make_batch()
    fgsm = step("fgsm", alpha=0.0)
    learner = make_learner(make_model())
    assert not torch.equal(fgsm(learner, x, y, x), fgsm(learner, x, y, x))


@pytest.mark.parametrize("name", ["standard", "fgsm", "n_fgsm", "pgd", "free"])
def test_images_labels_and_kept_delta_are_not_written_to(name):
    x, y = make_batch()
    kept = torch.full_like(x, 0.03)
    copies = x.clone(), y.clone(), kept.clone()
    keys = {"alpha": 0.02} if name == "pgd" else {}
    step(name, **keys)(make_learner(make_model()), x, y, kept)
    assert torch.equal(x, copies[0]) and torch.equal(y, copies[1]) and torch.equal(kept, copies[2])


@pytest.mark.parametrize("clip_start", [True, False])
def test_where_the_gradient_of_a_random_start_is_taken(clip_start):
    """Images of zeros: without clip_start half of the points lie below the pixel box; what is trained on never does."""
    seen = []

    class Recorder:
        def input_gradient(self, x, y):
            seen.append(x)
            return torch.ones_like(x), torch.ones(len(x), dtype=torch.bool)

        def update(self, x, y, box, ibp_weight):
            assert box is None and ibp_weight == 0
            seen.append(x)

    x = torch.zeros(4, 1, 10, 10)
    delta = methods.fgsm(
        Recorder(), x, torch.zeros(4), torch.zeros_like(x), epsilon=0.3, alpha=0.1, init="random", clip_start=clip_start
    )
    below = (seen[0] < 0).float().mean().item()
    assert below == 0 if clip_start else 0.35 < below < 0.65
    assert seen[0].abs().max() <= 0.3
    assert seen[1].min() >= 0 and torch.equal(seen[1], delta) and delta.max() <= 0.3
