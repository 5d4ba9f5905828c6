"""Tests of fastrobust.train.guard: made-up histories on either side of each rule."""

import pytest

from fastrobust.train import guard


def history(*epochs: tuple[float, float]) -> list[dict]:
    """Records of (accuracy under the training attack, accuracy under PGD) per epoch."""
    return [{"train_accuracy": t, "guard_accuracy": g} for t, g in epochs]


HEALTHY = history((0.20, 0.22), (0.28, 0.27), (0.33, 0.35), (0.37, 0.33), (0.41, 0.38), (0.45, 0.41), (0.52, 0.44))
COLLAPSE = history((0.20, 0.22), (0.28, 0.27), (0.33, 0.35), (0.36, 0.38), (0.62, 0.02))


def test_a_healthy_run_is_never_reported():
    for end in range(1, len(HEALTHY) + 1):
        assert guard.verdict(HEALTHY[:end], 0.2) is None, end


@pytest.mark.parametrize("before", [0.9, 0.45, 0.25])
def test_a_fall_by_more_than_drop(before):
    for drop in (0.05, 0.2):
        assert guard.fell(history((0.3, before), (0.3, before - drop - 0.01)), drop)
        assert not guard.fell(history((0.3, before), (0.3, before - drop + 0.01)), drop)
        assert not guard.fell(history((0.3, before), (0.3, before + drop + 0.01)), drop)


def test_a_fall_is_measured_between_the_last_two_epochs():
    slow = history((0.3, 0.6), (0.3, 0.45), (0.3, 0.3))
    assert not guard.fell(slow, 0.2)
    assert not guard.fell(history((0.3, 0.6), (0.3, 0.1), (0.3, 0.1)), 0.2)
    assert not guard.fell(history((0.3, 0.0)), 0.2)


def test_the_fall_is_named_with_both_figures():
    kind, why = guard.verdict(COLLAPSE, 0.2)
    assert kind == "overfit" and "38.0%" in why and "2.0%" in why
    for end in range(1, len(COLLAPSE)):
        assert guard.verdict(COLLAPSE[:end], 0.2) is None


def test_a_gap_is_a_hint_until_it_has_lasted():
    kind, why = guard.verdict(history((0.30, 0.2), (0.75, 0.0)), 0.3)
    assert kind == "suspect" and "75.0%" in why and "0.0%" in why
    assert guard.gapes(history((0.91, 0.4))[0]) and not guard.gapes(history((0.89, 0.4))[0])


@pytest.mark.parametrize(
    ("epochs", "found"),
    [
        ([(0.75, 0.0), (0.80, 0.0), (0.85, 0.0)], "overfit"),
        ([(0.75, 0.02), (0.80, 0.03), (0.85, 0.01)], "overfit"),
        ([(0.75, 0.0), (0.80, 0.05), (0.85, 0.10)], "suspect"),  # it may still close
        ([(0.40, 0.0), (0.80, 0.0), (0.85, 0.0)], "suspect"),  # for two epochs only
        ([(0.75, 0.0), (0.80, 0.0)], "suspect"),
        ([(0.75, 0.3), (0.80, 0.6), (0.85, 0.7)], None),  # it has closed
    ],
)
def test_a_run_that_never_was_robust(epochs, found):
    assert (guard.verdict(history(*epochs), 0.2) or (None,))[0] == found


def test_a_jump_is_a_hint():
    kind, why = guard.verdict(history((0.30, 0.3), (0.34, 0.33), (0.55, 0.4)), 0.2)
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


def test_a_fall_outranks_a_jump():
    both = history((0.30, 0.3), (0.34, 0.35), (0.60, 0.12))
    assert guard.jumped(both) and guard.fell(both, 0.2)
    assert guard.verdict(both, 0.2)[0] == "overfit"
    assert guard.verdict(both, 0.3)[0] == "suspect"
