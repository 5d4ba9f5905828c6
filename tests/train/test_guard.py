"""Tests of fastrobust.train.guard: made-up epochs on either side of each rule, and the simulation of its errors."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.guard import minibatches, simulate
from fastrobust.train import guard

N = guard.IMAGES


def history(*epochs: tuple[float, float], clean: float = 0.8, epsilon: float = 0.1) -> list[dict]:
    """Records of (accuracy under the training attack, accuracy under PGD) per epoch, at one radius."""
    keys = {"phase": 0, "guard_epsilon": epsilon, "guard_clean_accuracy": clean}
    return [{"epoch": e, "train_accuracy": t, "guard_accuracy": g, **keys} for e, (t, g) in enumerate(epochs, 1)]


def robust(share: float, n: int = N) -> torch.Tensor:
    """Verdicts of which the first `share` are robust."""
    return torch.arange(n) < round(share * n)


def judge(records: list[dict], drop: float = 0.2, n: int = N, before: torch.Tensor | None = None):
    """The verdict on the last epoch, with verdicts of images that belong to the accuracies."""
    if before is None and len(records) > 1:
        before = robust(records[-2]["guard_accuracy"], n)
    return guard.verdict(records, before, robust(records[-1]["guard_accuracy"], n), drop)


HEALTHY = history((0.20, 0.22), (0.28, 0.27), (0.33, 0.35), (0.37, 0.33), (0.41, 0.38), (0.45, 0.41), (0.52, 0.44))
COLLAPSE = history((0.20, 0.22), (0.28, 0.27), (0.33, 0.35), (0.36, 0.38), (0.62, 0.02))


def test_a_healthy_run_is_never_reported():
    for end in range(1, len(HEALTHY) + 1):
        assert judge(HEALTHY[:end]) is None, end


@pytest.mark.parametrize("before", [0.9, 0.45, 0.25])
def test_a_fall_by_more_than_drop(before):
    for drop in (0.05, 0.2):
        assert guard.fell(robust(before), robust(before - drop - 0.01), drop)
        assert not guard.fell(robust(before), robust(before - drop + 0.01), drop)
        assert not guard.fell(robust(before), robust(min(1.0, before + drop)), drop)


def test_a_fall_of_just_drop_is_none():
    """0.68 - 0.48 is larger than 0.2 in floating point."""
    assert 0.68 - 0.48 > 0.2
    assert not guard.fell(robust(0.68, 1000), robust(0.48, 1000), 0.2)
    assert guard.fell(robust(0.68, 1000), robust(0.479, 1000), 0.2)


def test_a_fall_must_be_more_than_chance():
    """Of 16 images 8 lost and 4 won is a fall of 25 points, and what a fair coin does in one of four epochs."""
    before = torch.tensor(12 * [True] + 4 * [False])
    now = torch.tensor(8 * [False] + 4 * [True] + 4 * [True])
    assert (before.sum() - now.sum()) / 16 == 0.25 and not guard.fell(before, now, 0.2)
    many = before.repeat(32), now.repeat(32)
    assert guard.fell(*many, 0.2)
    lost, won = 256, 128
    assert (lost - won) / math.sqrt(lost + won) > guard.SURE


def test_the_fall_is_named_with_both_figures():
    kind, why = judge(COLLAPSE)
    assert kind == "overfit" and "38.1%" in why and "2.0%" in why and f"{N} training images" in why
    for end in range(1, len(COLLAPSE)):
        assert judge(COLLAPSE[:end]) is None


def test_few_images_are_not_enough_to_end_a_run():
    few = guard.ENOUGH - 1
    assert judge(COLLAPSE, n=few)[0] == "suspect" and judge(COLLAPSE, n=guard.ENOUGH)[0] == "overfit"
    never = history((0.75, 0.0), (0.80, 0.0), (0.85, 0.0))
    assert judge(never, n=few)[0] == "suspect" and judge(never, n=guard.ENOUGH)[0] == "overfit"


def test_where_clean_accuracy_falls_too_it_is_another_trouble():
    records = history((0.5, 0.6), (0.5, 0.3))
    assert judge(records)[0] == "overfit"
    records[0]["guard_clean_accuracy"] = 0.95
    kind, why = judge(records)
    assert kind == "suspect" and "clean accuracy with it" in why
    records[0]["guard_clean_accuracy"] = 0.85  # 5 of 30 points are not all of the fall
    assert judge(records)[0] == "overfit"


def test_epochs_of_different_radii_are_not_compared():
    """While epsilon warms up, accuracy falls; and every epoch is another one's first at its radius."""
    records = history((0.9, 0.9)) + history((0.6, 0.5), epsilon=0.2) + history((0.5, 0.2), epsilon=0.3)
    for end in range(1, 4):
        assert judge(records[:end]) is None, end
    records += history((0.6, 0.25), epsilon=0.3)
    assert judge(records) is None
    assert [r["guard_epsilon"] for r in guard.comparable(records)] == [0.3, 0.3]
    assert judge([*records, *history((0.7, 0.01), epsilon=0.3)])[0] == "overfit"


def test_epochs_of_different_phases_are_not_compared():
    records = history((0.5, 0.6), (0.5, 0.2))
    records[1]["phase"] = 1
    assert judge(records) is None


def test_a_gap_is_a_hint_until_it_has_lasted():
    kind, why = judge(history((0.30, 0.2), (0.75, 0.1)))
    assert kind == "suspect" and "75.0%" in why and "10.0%" in why
    assert guard.gapes(history((0.91, 0.4))[0]) and not guard.gapes(history((0.89, 0.4))[0])


@pytest.mark.parametrize(
    ("epochs", "found"),
    [
        ([(0.75, 0.0), (0.80, 0.0), (0.85, 0.0)], "overfit"),
        ([(0.75, 0.02), (0.80, 0.03), (0.85, 0.01)], "overfit"),
        ([(0.75, 0.0), (0.80, 0.05), (0.85, 0.10)], "suspect"),  # it may still close
        ([(0.40, 0.0), (0.80, 0.0), (0.85, 0.0)], "suspect"),  # for two epochs only
        ([(0.75, 0.0), (0.80, 0.0)], "suspect"),
        ([(0.75, 0.0)], None),  # the first epoch at a radius: the average over it is of other weights and radii
        ([(0.75, 0.3), (0.80, 0.6), (0.85, 0.7)], None),  # it has closed
    ],
)
def test_a_run_that_never_was_robust(epochs, found):
    assert (judge(history(*epochs)) or (None,))[0] == found


def test_a_jump_is_a_hint():
    kind, why = judge(history((0.30, 0.3), (0.34, 0.33), (0.55, 0.4)))
    assert kind == "suspect" and "34.0%" in why and "55.0%" in why


@pytest.mark.parametrize(
    ("accuracies", "found"),
    [
        ((0.30, 0.34, 0.55), True),
        ((0.30, 0.34, 0.43), False),  # less than 0.1
        ((0.30, 0.40, 0.55), False),  # less than twice the gain before
        ((0.40, 0.34, 0.45), True),  # a loss before explains nothing
        ((0.05, 0.10, 0.35), False),  # the first take-off
        ((0.34, 0.55), False),  # too short to tell
        ((0.55, 0.56, 0.45), False),  # a fall is no jump
        ((0.10, 0.30, 0.34, 0.55), True),
        ((0.30, 0.34, 0.55, 0.56), False),  # only the last epoch counts
    ],
)
def test_when_it_is_a_jump(accuracies, found):
    assert guard.jumped(history(*((a, a - 0.01) for a in accuracies))) is found


@pytest.mark.parametrize(
    ("last", "clean", "images", "found"),
    [
        (0.20, 0.8, N, True),
        (0.21, 0.8, N, False),  # less than a third
        (0.20, 0.79, N, False),  # the model has become worse in another way
        (0.20, 0.8, 100, False),  # 1.6 standard deviations
    ],
)
def test_a_fall_of_several_epochs_is_a_hint(last, clean, images, found):
    records = history((0.30, 0.3), (0.32, 0.31), (0.33, 0.29), (0.34, 0.24), (0.35, last))
    records[-1]["guard_clean_accuracy"] = clean
    said = judge(records, n=images)
    assert (said is not None) == found
    if found:
        assert said == ("suspect", "PGD accuracy sank from 31.0% in epoch 2 to 20.0%, clean accuracy did not")


def test_of_the_histories_that_are_kept_only_those_of_failed_runs_are_suspected():
    """All runs among the result files whose epochs are kept. Guards of 2026-11-24 looked at 32 images."""
    suspected = set()
    for file in (Path(__file__).parents[2] / "benchmarks/results").rglob("*.json"):
        found = json.loads(file.read_text())
        epochs = found.get("history") if isinstance(found, dict) else None
        records = [r for r in epochs or [] if isinstance(r, dict) and "guard_accuracy" in r]
        ends = [guard.comparable([{"phase": 0} | r for r in records[: n + 1]]) for n in range(1, len(records))]
        if any(guard.sank(end, end[-1].get("guard_images", 32)) for end in ends):
            suspected.add(file.stem)
            summary = found.get("pgd") or found.get("summary")  # one file holds nothing but the epochs
            assert summary is None or summary["robust_accuracy"] < 0.3, file
    failed = [
        "rs_cs_9epochs_seed2",
        "n_fgsm_12epochs_seed1",
        "fgsm_12epochs_seed2",
        "gradalign_12epochs_seed2",
        "small_alpha2_seed1",
    ]
    failed += ["cifar10_16_small_zero_0", "cifar10_16_small_zero_no_augment_0", *(f"small_zero_seed{n}" for n in range(3))]
    assert suspected >= set(failed)


def test_a_fall_outranks_a_jump():
    both = history((0.30, 0.3), (0.34, 0.35), (0.60, 0.12))
    assert guard.jumped(both) and judge(both)[0] == "overfit" and judge(both, 0.3)[0] == "suspect"


def test_the_simulation():
    """The paper's rule with 16 images stops most healthy runs, as the binomial distribution has it; the guard's stops none,
    and misses no collapse to the ground."""
    chance = [math.comb(16, k) * 0.45**k * 0.55 ** (16 - k) for k in range(17)]
    alarm = sum(chance[a] * chance[b] for a in range(17) for b in range(17) if a - b > 3)  # more than 0.2 of 16
    rng = np.random.default_rng(1)
    found = sum(minibatches(rng, np.array([0.45, 0.45]), 16) for _ in range(4000)) / 4000
    assert found == pytest.approx(alarm, abs=0.02) and 0.1 < alarm < 0.11
    rows = {row["rule"]: row for row in simulate(runs=200)}
    assert rows["paper's, 16 images"]["stopped_healthy_0"] > 0.75
    for rule in ("guard, 256 images, churn 10%", "guard, 512 images, churn 30%"):
        assert rows[rule]["stopped_healthy_0"] == 0 and rows[rule]["missed_fall_0.4"] == 0


@pytest.mark.parametrize(
    ("alignments", "hint"),
    [
        ((0.7, 0.5, 0.3, 0.11), False),
        ((0.7, 0.5, 0.3, 0.09), True),
        ((0.7, 0.5, 0.05, 0.4), False),  # it is the last epoch that counts
        ((0.25, 0.2, 0.05), False),  # it never was high
        ((0.05,), False),
        ((), False),
    ],
)
def test_gradients_that_no_longer_agree_are_a_hint(alignments, hint):
    records = [record | {"alignment": a} for record, a in zip(HEALTHY, alignments, strict=False)] or HEALTHY
    found = guard.disagreement(records)
    assert (found is not None) is hint
    if hint:
        assert found[0] == "suspect" and found[1].endswith("alignment 0.09, at best 0.70")


def test_alignments_of_another_radius_are_not_compared():
    records = [record | {"alignment": a} for record, a in zip(HEALTHY, (0.9, 0.05), strict=False)]
    assert guard.disagreement(records) is not None
    records[0]["guard_epsilon"] /= 2
    assert guard.disagreement(records) is None
