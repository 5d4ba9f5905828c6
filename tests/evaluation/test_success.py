"""What counts as broken. The oracles: points made by hand, attacks that lie, and PGD's own word."""

from __future__ import annotations

import math

import pytest
import torch
from attack_runs import EPSILON, cheaper, few_images
from torch import nn

import fastrobust
from fastrobust.attack.base import Attack, Setting, parse
from fastrobust.attack.pgd import Pgd, StaticAttack
from fastrobust.attack.rounds import run_rounds
from fastrobust.attack.threat import Threat
from fastrobust.attack.verdicts import arithmetic, breaks, classified, evaluating, filled, plain_fp32
from fastrobust.data.augment import to_unit


@pytest.fixture(scope="module")
def model(finished_run):
    return fastrobust.load(finished_run)


@pytest.fixture(scope="module")
def data():
    return few_images()


class Brightness(nn.Module):
    """Class 1 where the mean is above 0.5, else class 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        score = (x.flatten(1).mean(1) - 0.5) * self.weight
        return torch.stack([-score, score], 1)


@pytest.mark.parametrize(
    "x, point, epsilon, counts",
    [
        (0.45, 0.55, 0.1, True),
        (0.45, 0.55 + 5e-7, 0.1, True),  # rounding
        (0.45, 0.55 + 3e-6, 0.1, False),  # out of the ball
        (0.45, 0.49, 0.1, False),  # not misclassified
        (0.45, math.nan, 0.1, False),
        (0.45, math.inf, 0.1, False),
        (0.4 - 5e-7, 0.5 + 2e-7, 0.1, False),  # misclassified only outside of the ball
    ],
)
def test_a_success_counts_in_the_threat_model_alone(x, point, epsilon, counts):
    images, points = torch.full((3, 1, 4, 4), x), torch.full((3, 1, 4, 4), point)
    found = breaks(Brightness(), images, torch.zeros(3, dtype=torch.int64), points, Threat(epsilon))
    assert found.tolist() == [counts] * 3


def test_one_pixel_outside_the_box_or_the_ball_is_enough_to_refuse_a_point():
    x, y = torch.full((5, 1, 4, 4), 0.48), torch.zeros(5, dtype=torch.int64)
    x[:, 0, 0, :2] = torch.tensor([0.0, 1.0])
    points = (x + 0.1).clamp(0, 1)
    points[1, 0, 0, 0] = -2e-6
    points[2, 0, 0, 1] = 1 + 2e-6
    points[3, 0, 3, 3] = 0.58 + 1e-4
    assert breaks(Brightness(), x, y, points, Threat(0.1)).tolist() == [True, False, False, False, True]


def test_a_model_that_gives_no_numbers_at_a_point_is_broken_there():
    class Fragile(nn.Module):
        def forward(self, x):
            return torch.stack([x.flatten(1).mean(1) / (x.flatten(1).amax(1) < 0.5), x.flatten(1).mean(1) - 9], 1)

    x, y = torch.full((1, 1, 2, 2), 0.45), torch.zeros(1, dtype=torch.int64)
    assert breaks(Fragile(), x, y, x + 0.1, Threat(0.11)).tolist() == [True]
    assert breaks(Fragile(), x, y, x, Threat(0.11)).tolist() == [False]


class Liar:
    """Says that it broke everything. The points for odd images are far off, those for every fourth are the images."""

    rounds, fixed, bf16 = 2, False, False

    def __init__(self, model):
        self.model = model

    def batches(self, number, alive):
        return ((index, index) for index in alive.nonzero()[:, 0].split(4))

    def run(self, x, y, start):
        points = x + 0.08
        points[start % 2 == 1] = 0.9
        points[start % 4 == 0] = x[start % 4 == 0]
        return torch.zeros(len(x), dtype=torch.bool), points


def test_what_an_attack_claims_is_checked():
    images = torch.full((12, 1, 4, 4), 115, dtype=torch.uint8)  # 0.451
    labels, robust = torch.zeros(12, dtype=torch.int64), torch.ones(12, dtype=torch.bool)
    refused = []
    liar = Liar(Brightness())
    run_rounds(liar, images, labels, robust, threat=Threat(0.1), after=lambda place, n, refusals: refused.append(refusals))
    assert (~robust).nonzero().flatten().tolist() == [2, 6, 10]
    assert sum(refused) == 9 * 2  # in both rounds
    believed = torch.ones(12, dtype=torch.bool)
    run_rounds(liar, images, labels, believed)
    assert not believed.any()


@pytest.mark.parametrize("static", [False, True], ids=["shrinking", "static"])
def test_pgd_hands_over_the_points_that_broke(model, data, static):
    x, y = to_unit(data.images[:32]), data.labels[:32]
    start = torch.empty_like(x).uniform_(-EPSILON, EPSILON, generator=torch.Generator().manual_seed(1))
    pgd = Pgd(Setting(model, data.images, Threat(EPSILON), EPSILON / 4, 32, 0), (9, 1))
    if static:
        pgd.static = StaticAttack(model, x, Threat(EPSILON), EPSILON / 4)
    with evaluating(model):
        survived, points = pgd.run(x[:30], y[:30], start[:30])
        assert 3 < survived.sum() < 27
        held = breaks(model, x[:30], y[:30], points, Threat(EPSILON))
    assert torch.equal(held, ~survived)
    assert (points - x[:30]).abs().amax() <= EPSILON + 1e-6


class Watched(nn.Module):
    """A network that remembers how many images it saw at a time, and in which memory format."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.seen = network, []

    def forward(self, x):
        self.seen.append((len(x), x.is_contiguous(memory_format=torch.channels_last)))
        return self.network(x)


def test_fixed_shapes_change_no_verdict(model, data):
    """As on a GPU: every batch of the attack and of the check of its successes is filled up to one size. Both networks see
    what breaks in three rounds; the one with fixed shapes sees batches of one size alone."""
    images, labels = data.images[:150].contiguous(memory_format=torch.channels_last), data.labels[:150]
    clean = classified(model, images, labels)
    found, seen = [], []
    for fixed in (False, True):
        watched, robust, refused = Watched(model), clean.clone(), []
        attack = Pgd(Setting(watched, images, Threat(EPSILON), EPSILON / 4, 25, 0), (5, 3))
        attack.fixed = fixed
        with evaluating(watched):
            note = lambda place, n, number, refused=refused: refused.append(number)
            run_rounds(attack, images, labels, robust, threat=Threat(EPSILON), after=note)
        found.append((robust, refused))
        seen.append(set(watched.seen))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert 10 < found[0][0].sum() < clean.sum() - 10, "some break and some do not"
    assert seen[1] == {(25, True)} and len(seen[0]) > 3


def test_batches_of_a_fixed_size_are_even():
    """520 images in batches of at most 500 are two of 260, not one of 500 and one of 20 that is filled up to 500."""

    class OnGpu(Pgd):
        fixed = property(lambda self: True, lambda self, value: None)

    images = torch.zeros(520, 1, 1, 1, dtype=torch.uint8)
    for most, size in ((500, 260), (520, 520), (260, 260), (100, 87), (1000, 520)):
        attack = OnGpu(Setting(Brightness(), images, Threat(0.1), 0.1, most, 0), (1, 1))
        assert attack.batch_size == size
        parts = [len(index) for index, _ in attack.batches(0, torch.ones(520, dtype=torch.bool))]
        assert sum(parts) == 520 and max(parts) <= most and len(parts) == -(-520 // most)


@pytest.mark.parametrize("name", ["pgd-t-1-1", "apgd-ce", "fab-t", "square"])
def test_other_attacks_see_few_sizes_on_a_gpu_and_find_the_same(name, model, data, monkeypatch):
    """AutoAttack goes on with the images that are left: their number is new at nearly every pass. Of 24 images and less they
    are filled up to 24, 12, 6, 3 or 1, and no verdict changes."""
    if "pgd-t" not in name:
        pytest.importorskip("pyautoattack")
    images, labels = data.images[:40], data.labels[:40]
    (kind, numbers), found = parse(name), []
    for fixed in (False, True):
        monkeypatch.setattr(Attack, "fixed", fixed)
        watched, robust = Watched(model), classified(model, images, labels)
        attack = kind(Setting(watched, images, Threat(EPSILON / 2), EPSILON / 8, 24, 0), numbers)
        if "pgd-t" not in name:
            cheaper(attack.attack)
            attack.attack.n_iter = 5
        with evaluating(watched):
            run_rounds(attack, images, labels, robust, threat=Threat(EPSILON / 2))
        found.append((robust, {size for size, _ in watched.seen}))
    (plain, sizes), (filled_up, few) = found
    assert torch.equal(plain, filled_up) and 0 < plain.sum() < 40
    assert few <= {24, 12, 6, 3, 1} and not sizes <= {24, 12, 6, 3, 1}


@pytest.mark.parametrize("size", [0, 3, 5, 7, 23])
def test_filled(size):
    t = torch.rand(5, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    more = filled(t, size)
    assert len(more) == max(5, size) and torch.equal(more[:5], t)
    assert more.is_contiguous(memory_format=torch.channels_last)


class Asks(nn.Module):
    """A model that notes whether TF32 is allowed while it runs."""

    def __init__(self):
        super().__init__()
        self.weight, self.found = nn.Parameter(torch.ones(())), []

    def forward(self, x):
        self.found.append(tf32())
        return torch.zeros(len(x), 2) * self.weight


def tf32() -> list:
    if hasattr(torch.backends.cudnn, "conv"):
        return [place.fp32_precision for place in (torch.backends.cudnn.conv, torch.backends.cuda.matmul)]
    return [place.allow_tf32 for place in (torch.backends.cudnn, torch.backends.cuda.matmul)]


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_verdicts_are_given_without_tf32(precision):
    """Whatever is allowed outside, in convolutions (torch's default) and in matrix products; it is the same afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        model, x, y = Asks().eval(), torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
        allowed = tf32()
        classified(model, x, y)
        breaks(model, x, y, x, Threat(0.1))
        assert len(model.found) == 2 and all(word in ("ieee", False) for found in model.found for word in found)
        assert tf32() == allowed and allowed[0] in ("tf32", True)
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_the_steps_compute_in_is_said(monkeypatch):
    assert arithmetic(torch.device("cpu")) == "fp32"
    for capability, words in (((9, 0), ["tf32", "fp32", "fp32"]), ((7, 5), ["fp32"] * 3)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        found = [arithmetic(torch.device("cuda"))]
        with plain_fp32():
            found.append(arithmetic(torch.device("cuda")))
        with monkeypatch.context() as m:
            m.setenv("NVIDIA_TF32_OVERRIDE", "0")
            found.append(arithmetic(torch.device("cuda")))
        assert found == words
