"""Tests of PGD. The oracles: a slow PGD without shortcuts, the closed form of a linear model, models that follow a script,
and torchattacks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import bar_images
from torch import nn

import fastrobust
from fastrobust.attack.pgd import packed, pgd
from fastrobust.attack.threat import Threat
from fastrobust.attack.verdicts import Verdicts
from fastrobust.data.augment import to_unit
from fastrobust.data.sets import ImageSet
from fastrobust.evaluation.accuracy import evaluate
from fastrobust.runtime.torchvision_compat import import_torchvision

EPSILON = 0.1


class Double(nn.Module):
    """A network computed in fp64: rounding that depends on how examples are batched cannot turn a verdict."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.double()

    def forward(self, x):
        return self.network(x.double())


def small_bars(count, seed):
    """Bars on every second pixel, 14 x 14: (uint8 N x 3 x 14 x 14, labels)."""
    images, labels = bar_images(count, seed)
    return torch.from_numpy(images)[:, ::2, ::2].permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


@pytest.fixture(scope="module")
def model():
    """A network that has learnt the small bars, with augmentation by noise so that it is a little robust."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 14 * 14, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    images, labels = small_bars(600, 1)
    for _ in range(150):
        picked = torch.randint(600, (50,))
        x = to_unit(images[picked]) + 0.1 * torch.randn(50, 3, 14, 14)
        optimizer.zero_grad()
        F.cross_entropy(network(x), labels[picked]).backward()
        optimizer.step()
    return Double(network).eval()


@pytest.fixture(scope="module")
def data():
    """300 fresh images, more than one chunk of noise; some labels are wrong, so that there are misclassified examples."""
    images, labels = small_bars(300, seed=99)
    labels[::17] = (labels[::17] + 1) % 10
    return images, labels


def run_pgd(model, data, epsilon=EPSILON, **changes) -> Verdicts:
    settings = {"threat": Threat(epsilon), "alpha": EPSILON / 4, "steps": 7, "restarts": 2}
    return pgd(model, *data, **(settings | changes))


def slow_pgd(model, images, labels, *, epsilon, alpha, steps, restarts, seed=0):
    """All examples, all restarts and all steps, whatever has been broken before. (clean, robust)"""
    x = images.float() / 255
    clean = model(x).argmax(1) == labels
    robust = clean.clone()
    everyone = torch.ones_like(clean)
    for restart in range(restarts):
        ((index, delta),) = packed(images, everyone, Threat(epsilon), len(labels), (seed, restart))
        assert index.tolist() == list(range(len(labels)))
        delta = (x + delta).clamp(0, 1) - x
        for step in range(steps + 1):
            z = (x + delta).detach().requires_grad_()
            logits = model(z)
            robust &= logits.argmax(1) == labels
            if step < steps:
                (gradient,) = torch.autograd.grad(F.cross_entropy(logits.float(), labels, reduction="sum"), z)
                delta = (delta + alpha * gradient.sign()).clamp(-epsilon, epsilon)
                delta = torch.max(torch.min(delta, 1 - x), -x)
    return clean, robust


# ---- verdicts


@pytest.mark.parametrize(
    "epsilon, steps, restarts, seed", [(0.1, 12, 3, 0), (0.05, 5, 2, 3), (0.2, 7, 1, 1), (0.3, 0, 2, 0)]
)
def test_verdicts_equal_those_of_a_pgd_without_shortcuts(model, data, epsilon, steps, restarts, seed):
    settings = {"alpha": epsilon / 4, "steps": steps, "restarts": restarts, "seed": seed}
    clean, robust = slow_pgd(model, *data, epsilon=epsilon, **settings)
    found = pgd(model, *data, threat=Threat(epsilon), batch_size=64, **settings)
    assert torch.equal(found.clean, clean)
    assert torch.equal(found.robust, robust)
    assert 0 < robust.sum() < clean.sum() < len(clean)  # the comparison says something


def test_batch_size_does_not_change_verdicts(model, data):
    a, b = (run_pgd(model, data, batch_size=n) for n in (37, 500))
    assert torch.equal(a.clean, b.clean)
    assert torch.equal(a.robust, b.robust)


def test_torchattacks_finds_about_the_same_accuracy(finished_run):
    import_torchvision()  # torchattacks imports it, and on its own that fails
    torchattacks = pytest.importorskip("torchattacks")
    model = fastrobust.load(finished_run)
    images, labels = map(torch.from_numpy, bar_images(300, 99))
    images = images.permute(0, 3, 1, 2)
    x = to_unit(images)
    torch.manual_seed(0)
    attack = torchattacks.PGD(model, eps=EPSILON, alpha=EPSILON / 4, steps=10, random_start=True)
    theirs = (model(attack(x, labels)).argmax(1) == labels).sum().item()
    mine = run_pgd(model, (images, labels), steps=10, restarts=1).robust.sum().item()
    assert 60 < theirs < 270
    assert theirs - 9 <= mine <= theirs + 3  # theirs looks at the last point alone


@pytest.mark.parametrize("low, high", [(60, 196), (0, 256)], ids=["far from the box", "in the whole box"])
@pytest.mark.parametrize("epsilon", [0.02, 0.06])
def test_a_linear_model_is_broken_exactly_where_its_closed_form_says(low, high, epsilon):
    """Each class looks at pixels of its own, so every gradient step lowers the label's logit and raises all others as
    far as they go, and PGD reaches the optimum: for each rival j the largest fall of (w_y - w_j) x within reach."""
    generator = torch.Generator().manual_seed(5)
    classes, size = 4, 2
    images = torch.randint(low, high, (400, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(classes, (400,), generator=generator)
    weight = torch.randn(3 * size * size, generator=generator).double()
    owner = torch.randint(classes, weight.shape, generator=generator)
    weight = torch.stack([weight * (owner == c) for c in range(classes)])
    linear = nn.Linear(3 * size * size, classes).double()
    linear.weight.data = weight * 0.8
    linear.bias.data = torch.tensor([0.05, -0.02, 0.0, 0.1]) - linear.weight.data.sum(1) / 2  # no class always wins
    x = to_unit(images).double().flatten(1)
    labels[:300] = linear(x).argmax(1)[:300]  # the rest are mostly misclassified

    worst = torch.full((400,), math.inf, dtype=torch.float64)
    for i, y in enumerate(labels.tolist()):
        for j in set(range(classes)) - {y}:
            direction = linear.weight[y] - linear.weight[j]
            margin = direction @ x[i] + linear.bias[y] - linear.bias[j]
            if low:  # pixels out of reach of the box: the dual norm
                margin = margin - epsilon * direction.norm(1)
            else:
                lowest = torch.where(direction > 0, (x[i] - epsilon).clamp(min=0), (x[i] + epsilon).clamp(max=1))
                margin = margin - direction @ (x[i] - lowest)
            worst[i] = min(worst[i], margin.item())
    assert worst.abs().min() > 1e-5  # no example on the edge
    exact = worst > 0

    found = pgd(
        Double(nn.Sequential(nn.Flatten(), linear)),
        images, labels, threat=Threat(epsilon), alpha=epsilon / 4, steps=9, restarts=1, batch_size=100,
    )  # fmt: skip
    assert torch.equal(found.robust, exact)
    assert 20 < exact.sum() < found.clean.sum() < 400


# ---- what counts


class Scripted(nn.Module):
    """Knows the images of `marked` by their brightness. Example i is misclassified at its visit break_at[i] (the clean
    image is visit 0; None: never), and there its loss is far lower than at all other visits. Remembers the points."""

    def __init__(self, break_at):
        super().__init__()
        self.break_at, self.visits, self.points = break_at, [0] * len(break_at), [[] for _ in break_at]
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        logits = []
        for point in x:
            i = round(point.mean().item() * 255 / 10)
            self.points[i].append(point.detach().clone())
            wrong = self.visits[i] == self.break_at[i]
            self.visits[i] += 1
            low_loss = [1.0, 1.01] + [-20.0] * 98  # cross-entropy 0.7, but class 1
            high_loss = [0.01] + [0.0] * 99  # cross-entropy 4.6, and class 0
            logits.append(torch.tensor(low_loss if wrong else high_loss) + 0 * point.sum())
        return torch.stack(logits)


def marked(count):
    """Images of one colour each, 10 grey levels apart; all labels are 0."""
    images = (torch.arange(count, dtype=torch.uint8) * 10).reshape(-1, 1, 1, 1).expand(count, 3, 4, 4).contiguous()
    return images, torch.zeros(count, dtype=torch.int64)


def test_one_misclassified_point_settles_an_example_whatever_its_loss():
    """Visit 1 is the first random start, 4 the last step of restart 0, and so on; the other points have a higher loss."""
    steps, restarts = 3, 3
    everything = 1 + restarts * (steps + 1)
    break_at = [None, *range(everything), None]
    scripted = Scripted(break_at)
    images, labels = marked(len(break_at))
    found = pgd(scripted, images, labels, threat=Threat(1 / 255), alpha=1 / 255, steps=steps, restarts=restarts)
    assert found.robust.tolist() == [at is None for at in break_at]
    assert found.clean.tolist() == [at != 0 for at in break_at]
    assert scripted.visits[0] == scripted.visits[-1] == everything  # those that hold are attacked to the end
    for at, visits in zip(break_at[1:-1], scripted.visits[1:-1], strict=True):
        restart_done = 1 + math.ceil(at / (steps + 1)) * (steps + 1)
        assert visits <= restart_done, "a broken example was attacked again in a later restart"


def test_points_lie_in_the_ball_and_the_box_and_start_at_the_noise(model, data):
    images, labels = data[0][:40].clone(), data[1][:40]
    images[::2, :, ::4], images[1::2, :, ::4] = 0, 255
    x, seen = to_unit(images), []

    right = F.one_hot(labels, 10)

    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, z):
            seen.append(z.detach().clone())
            return self.model(z) + 100 * right[: len(z)]  # nothing leaves the batch

    found = pgd(Recorder(), images, labels, threat=Threat(0.1), alpha=0.04, steps=4, restarts=2)
    assert found.robust.all()
    assert len(seen) == 1 + 2 * 5
    assert torch.equal(seen[0], x)
    for restart in range(2):
        points = seen[1 + 5 * restart : 6 + 5 * restart]
        ((_, noise),) = packed(images, torch.ones(40, dtype=torch.bool), Threat(0.1), 40, (0, restart))
        torch.testing.assert_close(points[0], (x + noise).clamp(0, 1), rtol=0, atol=1e-6)
        for before, after in itertools.pairwise(points):
            assert (after - before).abs().max() <= 0.04 + 1e-6
            assert (after - before).abs().max() > 0.03
        for point in points:
            assert (point - x).abs().max() <= 0.1 + 1e-6
            assert point.min() >= 0 and point.max() <= 1
    assert not torch.equal(seen[1], seen[6])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_gives_no_numbers_is_never_right(data, value):
    """argmax names the first of them, which would be right for a tenth of the labels."""

    class Broken(nn.Module):
        def __init__(self, since):
            super().__init__()
            self.since, self.calls = since, 0

        def forward(self, x):
            self.calls += 1
            return x.flatten(1)[:, :10] * 0 + (value if self.calls > self.since else F.one_hot(labels[: len(x)], 10))

    images, labels = data[0], torch.zeros_like(data[1])
    found = run_pgd(Broken(0), (images, labels))
    assert not found.clean.any() and not found.robust.any()
    found = run_pgd(Broken(1), (images, labels))
    assert found.clean.all() and not found.robust.any()


def test_epsilon_0_equals_clean_and_robust_accuracy_falls_with_epsilon(model, data):
    verdicts = [run_pgd(model, data, epsilon=e, alpha=e / 4) for e in (0.0, 0.05, 0.1, 0.2, 0.5)]
    assert torch.equal(verdicts[0].robust, verdicts[0].clean)
    counts = [v.robust.sum().item() for v in verdicts]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 5  # each radius is the one that was asked for
    for v in verdicts:
        assert torch.equal(v.clean, verdicts[0].clean)
        assert not (v.robust & ~v.clean).any()


def test_more_restarts_only_break_more(model, data):
    verdicts = [run_pgd(model, data, steps=2, restarts=n, epsilon=0.15).robust for n in (1, 2, 6)]
    for fewer, more in itertools.pairwise(verdicts):
        assert not (more & ~fewer).any()
    assert verdicts[0].sum() > verdicts[-1].sum()


def test_the_radius_must_be_named(model, data):
    with pytest.raises(TypeError, match="threat"):
        pgd(model, *data, alpha=0.01, steps=1, restarts=1)
    with pytest.raises(TypeError, match="epsilon"):
        evaluate(model, ImageSet(*data, (), ""), alpha=0.01, steps=1, restarts=1, batch_size=9)


# ---- what is left behind


def test_the_seed_decides_and_torchs_own_random_numbers_stay_untouched(model, data):
    before = torch.get_rng_state()
    first = run_pgd(model, data, seed=3, epsilon=0.2, steps=1, restarts=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1234)
    again = run_pgd(model, data, seed=3, epsilon=0.2, steps=1, restarts=1)
    assert torch.equal(first.robust, again.robust)
    others = [run_pgd(model, data, seed=s, epsilon=0.2, steps=1, restarts=1).robust for s in range(4, 10)]
    assert any(not torch.equal(first.robust, other) for other in others)


def test_progress_counts_the_examples_that_each_restart_attacked(model, data):
    counts = [0, 0, 0]

    def progress(restart, examples):
        assert 1 <= examples <= 50
        counts[restart] += examples

    run_pgd(model, data, restarts=3, batch_size=50, progress=progress, epsilon=0.15)
    left = [run_pgd(model, data, restarts=n, epsilon=0.15).robust.sum().item() for n in (1, 2)]
    assert counts == [run_pgd(model, data, restarts=1).clean.sum().item(), *left]
    assert counts[0] > counts[1]


def test_evaluate_reports_the_verdicts_of_the_attack(model, data, capsys):
    settings = {"alpha": 0.01, "steps": 3, "restarts": 2, "batch_size": 64, "seed": 5}
    found = evaluate(model, ImageSet(*data, (), ""), epsilon=0.07, **settings)
    verdicts = pgd(model, *data, threat=Threat(0.07), **settings)
    assert found.pop("seconds") > 0
    low, high = found.pop("clean_interval")
    assert low < verdicts.clean.sum() / 300 < high
    low, high = found.pop("robust_interval")
    assert low < verdicts.robust.sum() / 300 < high
    assert found == {
        "clean_accuracy": verdicts.clean.sum().item() / 300,
        "robust_accuracy": verdicts.robust.sum().item() / 300,
        "robust_accuracy_after_one_restart": run_pgd(model, data, epsilon=0.07, **settings | {"restarts": 1})
        .robust.sum()
        .item()
        / 300,
        "resolution": 14,
        "examples": 300,
        "norm": "linf",
        "epsilon": 0.07,
        "attack": "pgd-3-2",
        "alpha": 0.01,
        "arithmetic": "fp32",
    }
    assert 0 < found["robust_accuracy"] < found["clean_accuracy"] < 1
