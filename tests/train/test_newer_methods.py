"""Tests of the methods after the paper: a few steps of each against the same written out from its paper, with plain
`backward` calls, masks and loops. The network has BatchNorm. Weights, running averages and states agree to 1e-5."""

import copy

import pytest
import torch
from method_steps import section
from small_learner import make_batches, make_model, sgd
from torch import Tensor

from fastrobust.attack.threat import Threat
from fastrobust.runtime.errors import ConfigError
from fastrobust.train.learner import Learner
from fastrobust.train.methods.base import Inputs, Shapes
from fastrobust.train.methods.fgsm_pgi import last_of_each
from fastrobust.train.methods.gradalign import cosine
from fastrobust.train.methods.n_aaer import against_abnormal

EPSILON, LR, N, CLASSES, EXAMPLES = 0.1, 0.1, 8, 4, 20
EPOCHS = [0.1, 0.6, 1.1, 1.6, 2.1, 2.6, 3.1, 3.6]  # when the updates take place: a run of 4 epochs


def batches(count: int) -> list[Inputs]:
    """The images' numbers go round: those of a batch come back in the third after it; one is twice in its batch."""
    made = []
    for k, (x, y) in enumerate(make_batches(count, N)):
        index = torch.arange(k * N, (k + 1) * N) % EXAMPLES
        index[5] = index[2]
        made.append(Inputs((x * 1.4 - 0.2).clamp(0, 1), y, index))
    return made


class Run:
    """A method that trains the small network."""

    def __init__(self, name: str, epsilon: float = EPSILON, **keys):
        self.model, self.method, self.threat = make_model(), section(name, epsilon, **keys), Threat(epsilon)
        rates = {"epoch_table": torch.tensor(EPOCHS), "batchnorm_in_attack": self.method.batchnorm_in_attack}
        self.learner = Learner(self.model, sgd(), torch.full((len(EPOCHS),), LR), **rates)
        self.state = self.method.state(Shapes((N, 1, 6, 6), CLASSES, EXAMPLES, torch.device("cpu")))
        self.first = {name: t.clone() for name, t in self.state.items()}

    def steps(self, count: int, scale: float = 1.0):
        torch.manual_seed(5)
        for batch in batches(count):
            self.method.step(self.learner, batch, self.threat, scale, self.state)
        return self


class Slow:
    """The same network, and plain SGD."""

    def __init__(self):
        self.model = make_model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
        torch.manual_seed(5)

    def update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def gradient(self, x: Tensor, loss_of, **options) -> tuple[Tensor, Tensor]:
        """(of the loss at x, the logits there)"""
        x = x.clone().requires_grad_()
        logits = self.model(x)
        loss_of(logits).backward(retain_graph=True, **options)
        gradient = x.grad.clone()
        self.optimizer.zero_grad()
        return gradient, logits


def agree(run: Run, slow: Slow) -> None:
    assert not torch.equal(run.model[4].weight, make_model()[4].weight)
    for (name, a), b in zip(run.model.state_dict().items(), slow.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with probabilities, the mean over the examples."""
    return -sum((t * z.log_softmax(0)).sum() for z, t in zip(logits, targets, strict=True)) / len(logits)


def targets(y: Tensor, label: float) -> Tensor:
    """`label` for the label, and the others have the rest."""
    rows = torch.full((len(y), CLASSES), (1 - label) / (CLASSES - 1))
    for row, k in zip(rows, y.tolist(), strict=True):
        row[k] = label
    return rows


def smooth(logits: Tensor, y: Tensor, amount: float = 0.4) -> Tensor:
    return entropy(logits, targets(y, 1 - amount + amount / CLASSES))


def ball(d: Tensor, epsilon: float = EPSILON) -> Tensor:
    return torch.clamp(d, -epsilon, epsilon)


def uniform(x: Tensor, radius: float) -> Tensor:
    return (2 * torch.rand_like(x) - 1) * radius


# ---- universal perturbations


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("name", ["fgsm_uap", "class_uap"])
def test_universal_perturbations(name, stop):
    run, alpha = Run(name, stop_gradient=stop), 1.25 * EPSILON
    u = run.first["u"] * alpha
    assert set(run.first["u"].unique().tolist()) == {-1.0, 1.0} and len(u) == (1 if name == "fgsm_uap" else CLASSES)
    m = [torch.zeros(1, 6, 6) for _ in u]
    slow = Slow()
    for x, y, _ in batches(5):
        row = y if name == "class_uap" else torch.zeros_like(y)
        start = (x + ball(torch.stack([u[k] for k in row]))).clamp(0, 1)
        g, at_start = slow.gradient(start, lambda z, y=y: smooth(z, y))
        end = (x + ball(start - x + EPSILON * g.sign())).clamp(0, 1)
        z = slow.model(end)
        at_start = at_start.detach() if stop else at_start
        slow.update(smooth(z, y) + 10 * ((z - at_start) ** 2).sum() / z.numel())
        g = g / g.abs().sum()
        for k in set(row.tolist()):
            m[k] = 0.3 * m[k] + g[row == k].mean(0)
            u[k] = (u[k] + alpha * m[k].sign()).clamp(-alpha, alpha)
    agree(run.steps(5), slow)
    torch.testing.assert_close(run.state["u"] * alpha, u)
    assert not torch.equal(run.state["u"], run.first["u"])


def test_stopping_the_gradient_matters():
    assert not torch.allclose(
        Run("fgsm_uap").steps(1).model[4].weight, Run("fgsm_uap", stop_gradient=True).steps(1).model[4].weight
    )


# ---- LIET


def some_at_random(y: Tensor, amount: float) -> Tensor:
    """Targets: the others share `amount` at random."""
    rows = torch.rand(len(y), CLASSES)
    for row, k in zip(rows, y.tolist(), strict=True):
        row[k] = 0
        row *= amount / row.sum()
        row[k] = 1 - amount
    return rows


@pytest.mark.parametrize(("epsilon", "stop"), [(6 / 255, False), (0.1, False), (0.1, True)], ids=["small", "large", "stop"])
def test_liet(epsilon, stop):
    """Two of the four classes are looked at in every step. The settings depend on epsilon."""
    run, small = Run("liet", epsilon, every=2, stop_gradient=stop), epsilon < 0.05
    radius, (low, high), amount, most = (1, (0.1, 0.5), 0.6, 100) if small else (2, (0, 1), 0.4, 20)
    assert run.method.noisy == (low, high) and Run("liet", epsilon).method.every == (20 if small else 10)
    information, slow = torch.zeros(CLASSES, 1, 6, 6), Slow()
    for step, (x, y, _) in enumerate(batches(4)):
        slow.model.eval()
        looked_at = torch.tensor([0, 1] if step % 2 == 0 else [2, 3])
        random = some_at_random(looked_at, amount)
        g, _ = slow.gradient(torch.full((2, 1, 6, 6), 0.5), lambda z, random=random: entropy(z, random))
        information[looked_at] = epsilon * g.sign()
        slow.model.train()
        share = low + (high - low) * torch.rand(())
        noisy = torch.rand_like(x) < share
        delta = information[y]
        delta[noisy] = uniform(x, radius * epsilon)[noisy]
        start = (x - delta if torch.rand(()) < 0.5 else x + delta).clamp(0, 1)
        random = some_at_random(y, amount)
        g, at_start = slow.gradient(start, lambda z, random=random: entropy(z, random))
        delta = start - x + epsilon * g.sign()
        z = slow.model((x + (ball(delta, epsilon) if small else delta)).clamp(0, 1))
        p, q = (at_start.detach() if stop else at_start).softmax(1), z.softmax(1)
        middle = (p + q) / 2
        divergence = ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2 / N
        weight = most * (int(EPOCHS[step]) + 1) / 4
        slow.update(entropy(z, some_at_random(y, amount)) + weight * divergence)
    agree(run.steps(4), slow)
    torch.testing.assert_close(run.state["information"] * epsilon, information)


def test_liet_looks_at_every_class_once_in_so_many_steps():
    """Five steps for four classes: the fifth looks at none."""
    run, seen = Run("liet", every=5), []
    for batch in batches(5):
        before = run.state["information"].clone()
        run.method.step(run.learner, batch, run.threat, 1.0, run.state)
        seen += [k for k in range(CLASSES) if not torch.equal(before[k], run.state["information"][k])]
    assert seen == [0, 1, 2, 3] and run.state["count"] == 5


# ---- FGSM-PGI


@pytest.mark.parametrize("stop", [False, True])
def test_fgsm_pgi(stop):
    """What is kept is rounded to fp16 here too: delta in units of epsilon, m in units of 1 / pixels of the batch."""
    run, slow = Run("fgsm_pgi", reset=2, consistency=1, stop_gradient=stop), Slow()
    kept, again = {}, 0
    for step, (x, y, index) in enumerate(batches(8)):
        if step and int(EPOCHS[step]) // 2 != int(EPOCHS[step - 1]) // 2:
            kept = {}
        fresh = (torch.rand_like(x) - 0.5).sign() * EPSILON
        delta, m = fresh.clone(), torch.zeros_like(x)
        for i, image in enumerate(index.tolist()):
            if image in kept:
                delta[i], m[i] = (t.float() for t in kept[image])
                delta[i] *= EPSILON
                again += 1
        g, at_start = slow.gradient((x + delta).clamp(0, 1), lambda z, y=y: smooth(z, y))
        m = g / g.abs().sum() * x.numel() + 0.3 * m
        following = torch.clamp(x + ball(delta + EPSILON * m.sign()), 0, 1) - x
        z = slow.model((x + ball(delta + EPSILON * g.sign())).clamp(0, 1))
        at_start = at_start.detach() if stop else at_start
        slow.update(smooth(z, y) + ((z - at_start) ** 2).mean())
        for i, image in enumerate(index.tolist()):
            kept[image] = (following[i] / EPSILON).half(), m[i].half()
    agree(run.steps(8), slow)
    assert again > 15
    for image, (delta, m) in kept.items():
        torch.testing.assert_close(run.state["delta"][image], delta, rtol=0, atol=2e-3)
        torch.testing.assert_close(run.state["m"][image], m, rtol=0, atol=2e-3)
    assert run.state["delta"].dtype == torch.float16 and run.state["round"][list(kept)].unique().tolist() == [1.0]


def test_a_store_that_cannot_fit_is_refused_before_it_is_made():
    shapes = Shapes((N, 3, 224, 224), 1000, 10**8, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"keeps 4 bytes for each pixel .*6.02e\+04 GB"):
        section("fgsm_pgi").state(shapes)


def test_the_last_place_of_each_image():
    assert last_of_each(torch.tensor([7, 3, 7, 5, 3])).tolist() == [2, 4, 2, 3, 4]


# ---- TRADES


def kl(p: Tensor, q: Tensor) -> Tensor:
    return sum((a * (a / b).log()).sum() for a, b in zip(p, q, strict=True)) / len(p)


def slow_trades_attack(slow: Slow, x: Tensor, steps: int) -> Tensor:
    slow.model.eval()
    p = slow.model(x).softmax(1).detach()
    point = x + 0.001 * torch.randn_like(x)
    for _ in range(steps):
        g, _ = slow.gradient(point, lambda z: kl(p, z.softmax(1)))
        point = (x + ball(point - x + EPSILON / 4 * g.sign())).clamp(0, 1)
    slow.model.train()
    return point


def test_trades():
    run, slow = Run("trades", steps=3, beta=2), Slow()
    for x, y, _ in batches(3):
        point = slow_trades_attack(slow, x, 3)
        z, clean = slow.model(point), slow.model(x)
        slow.update(smooth(clean, y, 0) + 2 * kl(clean.softmax(1), z.softmax(1)))
    agree(run.steps(3), slow)


# ---- N-AAER


def abnormal_loss(at_start: Tensor, z: Tensor, y: Tensor, weights: tuple[float, float]) -> tuple[Tensor, int, bool]:
    """As published, with masks. Also how many are abnormal, and whether their logits moved more than the others'."""
    before, after = (torch.stack([smooth(a[None], b[None], 0) for a, b in zip(t, y, strict=True)]) for t in (at_start, z))
    abnormal = before > after
    if not 0 < abnormal.sum() < len(y):
        return after.mean(), int(abnormal.sum()), False
    changes = ((z - at_start) ** 2).sum(1)
    difference = changes[abnormal].mean() - changes[~abnormal].mean().item()
    term = weights[0] * (before - after)[abnormal].mean() + weights[1] * max(difference, 0 * difference)
    return after.mean() + abnormal.sum() / len(y) * term, int(abnormal.sum()), bool(difference > 0)


def test_n_aaer():
    run, slow, found = Run("n_aaer", alpha=1, noise=5), Slow(), 0
    for x, y, _ in batches(4):
        start = (x + uniform(x, 5 * EPSILON)).clamp(0, 1)
        g, at_start = slow.gradient(start, lambda z, y=y: smooth(z, y, 0))
        z = slow.model((start + g.sign()).clamp(0, 1))
        loss, count, _ = abnormal_loss(at_start.detach(), z, y, (1.5, 0.15))
        slow.update(loss)
        found += count
    agree(run.steps(4), slow)
    assert found


def test_abnormal_examples():
    """Many, none, and nothing but them; with logits that moved more than the others', and less."""
    learner, seen = Run("n_aaer").learner, set()
    for seed in range(12):
        torch.manual_seed(seed)
        y = torch.randint(CLASSES, (N,))
        at_start, z = torch.randn(N, CLASSES), torch.randn(N, CLASSES, requires_grad=True)
        if seed < 2:
            z.data = at_start.clone()
            z.data[torch.arange(N), y] += seed * 2 - 1
        expected, count, larger = abnormal_loss(at_start, z, y, (1.5, 0.15))
        found = against_abnormal(at_start, learner, 1.0, 1.5, 0.15)(z, y)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (found, expected)))
        seen |= {(count in (0, N), larger), count}
    assert {(True, False), (False, True), (False, False), 0, N} <= seen


# ---- FGSM-RS-CS


def test_rs_cs():
    """Of four epochs the third is the one in which the loss is steadied; the means are those of the epoch before."""
    run, slow, means, added = Run("rs_cs", threshold=0.01), Slow(), {}, []
    for step, (x, y, _) in enumerate(batches(8)):
        epoch = int(EPOCHS[step])
        start = (x + uniform(x, EPSILON)).clamp(0, 1)
        g, at_start = slow.gradient(start, lambda z, y=y: smooth(z, y))
        soft = 0.6 * targets(y, 0.6) + 0.4 / CLASSES
        z, at_start = slow.model((start + EPSILON * g.sign()).clamp(0, 1)), entropy(at_start, soft)
        loss = entropy(z, soft)
        means.setdefault(epoch, []).append(at_start.item())
        if 2 <= epoch <= 4 - 2:
            distance = at_start.item() - sum(means[epoch - 1]) / 2
            if abs(distance) > 0.01:
                loss = loss + at_start if distance > 0 else loss - at_start
                added.append(distance)
        slow.update(loss)
    agree(run.steps(8), slow)
    assert added and run.state["epoch"] == 3
    torch.testing.assert_close(run.state["last"].item(), sum(means[2]) / 2)


# ---- GradAlign


def test_gradalign():
    run, slow = Run("gradalign", weight=2), Slow()
    for x, y, _ in batches(3):
        g, _ = slow.gradient(x, lambda z, y=y: smooth(z, y, 0))
        other = (x + uniform(x, EPSILON)).clamp(0, 1).requires_grad_()
        (h,) = torch.autograd.grad(smooth(slow.model(other), y, 0), other, create_graph=True)
        z = slow.model((x + EPSILON * g.sign()).clamp(0, 1))
        cosines = [(a * b).sum() / (a.norm() * b.norm()) for a, b in zip(g, h, strict=True)]
        slow.update(smooth(z, y, 0) + 2 * (1 - sum(cosines) / N))
    agree(run.steps(3), slow)
    assert min(cosines) < 0.99


@pytest.mark.parametrize(("epsilon", "weight"), [(4 / 255, 0.02 * 10**0.5), (8 / 255, 0.2), (16 / 255, 2.0), (0.1, 2.0)])
def test_the_weight_of_gradalign_by_epsilon(epsilon, weight):
    assert section("gradalign", epsilon).weight == pytest.approx(weight)


def test_gradalign_leaves_out_examples_without_gradient():
    run = Run("gradalign")
    a, b = torch.rand(4, 1, 6, 6), torch.rand(4, 1, 6, 6)
    a[1] = b[2] = 0
    expected = [torch.cosine_similarity(a[k].flatten(), b[k].flatten(), dim=0) for k in (0, 3)]
    torch.testing.assert_close(cosine(a, b, run.learner), sum(expected) / 2)


# ---- SORA


def test_sora():
    run, slow, v = Run("sora"), Slow(), 0.99
    for x, y, _ in batches(4):
        start = (x + uniform(x, EPSILON)).clamp(0, 1)
        g, _ = slow.gradient(start, lambda z, y=y: smooth(z, y, 0))
        alpha = 2 * EPSILON * min(1, 0.02 / (1 - v))
        end = (start + alpha * torch.rand_like(x) * g.sign()).clamp(0, 1).requires_grad_()
        slow.update(smooth(slow.model(end), y, 0))
        along = [(a.sign() * b).sum().item() / a.abs().sum().item() for a, b in zip(g, end.grad, strict=True)]
        v = 0.95 * v + 0.05 * max(-1, min(1, sum(along) / N))
    agree(run.steps(4), slow)
    assert run.state["agreement"].item() == pytest.approx(v, abs=1e-5) and v < 0.98


# ---- AWP


def slow_awp(slow: Slow, gamma: float, loss_of) -> None:
    """The published way: a copy of the model finds the direction, the weights go there, and are put back."""
    proxy = copy.deepcopy(slow.model)
    loss_of(proxy).backward()
    moves = []
    for p, q in zip(slow.model.parameters(), proxy.parameters(), strict=True):
        moves.append(gamma * q.detach().norm() * q.grad / q.grad.norm() if p.dim() > 1 else torch.zeros_like(p))
        p.data += moves[-1]
    slow.optimizer.zero_grad()
    loss_of(slow.model).backward()
    for p, move in zip(slow.model.parameters(), moves, strict=True):
        p.data -= move
    slow.optimizer.step()


def test_awp_around_trades():
    run, slow = Run("awp", of={"name": "trades", "steps": 2}, begin=0.2, gamma=0.05), Slow()
    for step, (x, y, _) in enumerate(batches(4)):
        point = slow_trades_attack(slow, x, 2)

        def loss_of(model, x=x, y=y, point=point):
            z, clean = model(point), model(x)
            return smooth(clean, y, 0) + 6 * kl(clean.softmax(1), z.softmax(1))

        slow_awp(slow, 0.05 if EPOCHS[step] >= 0.2 * 4 else 0, loss_of)
    agree(run.steps(4), slow)


def test_awp_around_a_method_whose_update_reaches_back_to_the_start():
    """The direction is found with the logits at the start as they are; the update's gradient goes through both."""
    run, slow = Run("awp", of={"name": "fgsm_uap"}, begin=0), Slow()
    u = run.first["u"] * 1.25 * EPSILON
    ((x, y, _),) = batches(1)
    start = (x + ball(u)).clamp(0, 1)
    g, at_start = slow.gradient(start, lambda z: smooth(z, y))
    end = (x + ball(start - x + EPSILON * g.sign())).clamp(0, 1)
    weights = dict(slow.model.named_parameters())
    proxy = copy.deepcopy(slow.model)
    (smooth(z := proxy(end), y) + 10 * ((z - at_start.detach()) ** 2).mean()).backward()
    moved = {
        name: weights[name] + 0.01 * p.detach().norm() * p.grad / p.grad.norm()
        for name, p in proxy.named_parameters()
        if p.dim() > 1
    }
    z = torch.func.functional_call(slow.model, moved, end)
    slow.update(smooth(z, y) + 10 * ((z - at_start) ** 2).mean())
    agree(run.steps(1), slow)


@pytest.mark.parametrize(("of", "gamma"), [("trades", 0.005), ("fgsm", 0.01)])
def test_awp_has_the_properties_of_what_it_is_around(of, gamma):
    awp, alone = section("awp", of={"name": of}), section(of)
    assert (awp.gamma, awp.batchnorm_in_attack, awp.of.alpha) == (gamma, alone.batchnorm_in_attack, alone.alpha)
    assert section("awp", of={"name": "free", "replays": 3}).updates_per_batch == 3
    assert section("awp", of={"name": "free"}).by_slot == ("delta",)
    assert not section("awp", of={"name": "standard"}).attacks
    assert awp.describe().endswith(f"of {alone.describe()}")
    run = Run("awp", of={"name": of}).steps(1)
    assert run.learner.moved is None


# ---- what holds for all of them

ALL = {
    "fgsm_uap": {"alpha": 0.1},
    "class_uap": {"alpha": 0.1},
    "liet": {"noise": 1, "project": True, "noisy": [0, 1], "consistency": 3, "label_smoothing": 0.1},
    "fgsm_pgi": {},
    "trades": {"alpha": 0.1, "steps": 2},
    "n_aaer": {"alpha": 0.1},
    "rs_cs": {"alpha": 0.1},
    "gradalign": {"weight": 1},
    "sora": {"alpha": 0.1},
    "awp": {"of": {"name": "n_fgsm", "alpha": 0.1}},
}


@pytest.mark.parametrize("name", ALL)
def test_the_scale_multiplies_epsilon_and_alpha(name):
    """At a scale of 1/4 as in a config with a quarter of epsilon and alpha."""
    smaller = ALL[name] | ({"alpha": 0.025} if "alpha" in ALL[name] else {})
    smaller |= {"of": {"name": "n_fgsm", "alpha": 0.025}} if name == "awp" else {}
    runs = Run(name, 0.1, **ALL[name]).steps(2, torch.tensor(0.25)), Run(name, 0.025, **smaller).steps(2)
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_a_state_is_written_in_place_and_inputs_are_not_written_to(name):
    run = Run(name, **ALL[name])
    assert set(run.state) == set(run.method.agreed)
    before = {key: t.data_ptr() for key, t in run.state.items()}
    (batch,) = batches(1)
    copies = [t.clone() for t in batch]
    run.method.step(run.learner, batch, run.threat, 1.0, run.state)
    assert {key: t.data_ptr() for key, t in run.state.items()} == before
    assert all(torch.equal(a, b) for a, b in zip(batch, copies, strict=True))
    assert all(not torch.equal(t, run.first[key]) for key, t in run.state.items() if key not in ("epoch", "last"))


@pytest.mark.parametrize("name", ["fgsm_uap", "class_uap", "fgsm_pgi", "liet", "sora"])
def test_a_gradient_that_overflowed_leaves_the_state_healthy(name):
    """As fp16's can: the update is skipped, and later steps find a direction again."""
    run = Run(name)
    hook = run.model[4].register_full_backward_pre_hook(lambda module, gradient: (gradient[0] * float("inf"),))
    weights = {key: t.clone() for key, t in run.model.state_dict().items()}
    run.steps(1)
    hook.remove()
    run.model.load_state_dict(weights)
    run.steps(2)
    assert all(t.isfinite().all() for t in run.state.values())


def test_the_first_signs_are_those_of_the_seed():
    shapes = [Shapes((N, 1, 6, 6), CLASSES, EXAMPLES, torch.device("cpu"), seed) for seed in (1, 1, 2)]
    torch.manual_seed(7)
    first, again, other = (section("class_uap").state(s)["u"] for s in shapes)
    assert torch.equal(first, again) and not torch.equal(first, other)
