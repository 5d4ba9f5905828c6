"""Tests of fastrobust.train.schedules, and of the table of learning rates of a run, against tables worked out by hand."""

import pytest
import torch

from fastrobust.config import reading
from fastrobust.runtime.errors import ConfigError
from fastrobust.train import schedules
from fastrobust.train.schedules import epsilon_scale_table, lr_table, steps_in

IMAGENET = [(0, 0), (1, 0.4), (6, 0.04), (12, 0.004), (15, 0.0004)]


def make_config(method: str = "standard", schedule=None, phases=None, warmup: float = 0, **method_keys):
    return reading.parse(
        {
            "name": "test",
            "epsilon": 0.3,
            "epsilon_warmup": warmup,
            "data": {"dataset": "mnist"},
            "model": {"name": "mnist_net"},
            "method": {"name": method, **method_keys},
            "optimizer": {"name": "sgd"},
            "schedule": schedule or {"name": "cyclic", "max_lr": 0.2},
            "phases": phases or [{"epochs": 10, "batch_size": 100}],
        },
        "test",
    )


def schedule_of(section: dict, epochs: int):
    """The learning rate at every epoch, as a function, by a config's `schedule` section."""
    found = make_config(schedule=section, phases=[{"epochs": epochs, "batch_size": 100}])
    return lambda epoch: found.schedule.rate(epoch, found.epochs)


@pytest.mark.parametrize(
    ("epoch", "lr"),
    [(0, 0), (1, 0.05), (3, 0.15), (4, 0.2), (5.5, 0.15), (7, 0.1), (8.5, 0.05), (10, 0), (11, 0)],
)
def test_cyclic_with_the_papers_peak(epoch, lr):
    assert schedules.cyclic(epoch, 10, 0.2) == pytest.approx(lr, abs=1e-12)


@pytest.mark.parametrize(("epoch", "lr"), [(0, 0), (7.5, 0.1), (14.999999, 0.2), (15, 0.2), (22.5, 0.1), (30, 0)])
def test_cyclic_with_a_peak_in_the_middle(epoch, lr):
    assert schedules.cyclic(epoch, 30, 0.2, peak=0.5) == pytest.approx(lr, abs=1e-6)


def test_cyclic_has_one_peak():
    rates = [schedules.cyclic(k / 100, 10, 0.21) for k in range(1001)]
    top = rates.index(max(rates))
    assert top == 400 and rates[top] == pytest.approx(0.21)
    assert rates[: top + 1] == sorted(set(rates[: top + 1]))
    assert rates[top:] == sorted(set(rates[top:]), reverse=True)


@pytest.mark.parametrize(
    ("epoch", "lr"),
    [(0, 0.1), (99.999, 0.1), (100, 0.01), (149.999, 0.01), (150, 0.001), (199.9, 0.001), (200, 0.001)],
)
def test_multistep_milestones_are_fractions_that_fire(epoch, lr):
    """Trap 2: a fraction taken for an epoch number would fire in epoch 0, or never."""
    assert schedules.multistep(epoch, 200, 0.1, (0.5, 0.75)) == pytest.approx(lr)


def test_multistep_counts_every_milestone():
    table = {0: 1.0, 1: 0.5, 2: 0.25, 3: 0.125}
    for passed, lr in table.items():
        assert schedules.multistep(passed + 0.5, 4, 1.0, (0.25, 0.5, 0.75), factor=0.5) == pytest.approx(lr)
    assert schedules.multistep(3.9, 4, 1.0, ()) == 1.0


@pytest.mark.parametrize(
    ("epoch", "lr"),
    [
        (0, 0), (0.25, 0.1), (0.5, 0.2), (1, 0.4), (2, 0.328), (3.5, 0.22), (6, 0.04), (9, 0.022), (12, 0.004),
        (13.5, 0.0022), (15, 0.0004), (16, 0.0004),
    ],
)  # fmt: skip
def test_points_give_the_imagenet_schedule(epoch, lr):
    assert schedules.interpolate(IMAGENET, epoch) == pytest.approx(lr)


def test_points_jump_where_an_epoch_stands_twice():
    points = [(0, 0.1), (0, 0.2), (2, 0.4), (2, 1.0), (2, 3.0), (4, 1.0), (4, 0.5)]
    table = {-1: 0.1, 0: 0.2, 1: 0.3, 1.999: 0.3999, 2: 3.0, 3: 2.0, 3.999: 1.001, 4: 0.5, 9: 0.5}
    for epoch, lr in table.items():
        assert schedules.interpolate(points, epoch) == pytest.approx(lr), epoch


def test_points_are_constant_outside():
    assert schedules.interpolate([(2, 0.3), (3, 0.5)], 0) == 0.3
    assert schedules.interpolate([(2, 0.3), (3, 0.5)], 7) == 0.5


def test_a_config_section_is_its_schedule():
    cyclic = schedule_of({"name": "cyclic", "max_lr": 0.2, "peak": "1/4"}, 8)
    assert [cyclic(e) for e in (0, 1, 2, 5, 8)] == pytest.approx([0, 0.1, 0.2, 0.1, 0])
    multistep = schedule_of({"name": "multistep", "lr": 0.3, "milestones": [0.25, 0.5], "factor": 0.2}, 8)
    assert [multistep(e) for e in (0, 1.99, 2, 3.99, 4, 8)] == pytest.approx([0.3, 0.3, 0.06, 0.06, 0.012, 0.012])
    points = schedule_of({"name": "points", "points": IMAGENET}, 15)
    assert [points(e) for e in (0.5, 6, 13.5)] == pytest.approx([0.2, 0.04, 0.0022])


def test_the_highest_rate():
    rates = {
        0.2: {"name": "cyclic", "max_lr": 0.2, "peak": 0.3},
        0.3: {"name": "multistep", "lr": 0.3, "milestones": [0.5], "factor": 0.1},
        0.4: {"name": "points", "points": IMAGENET},
    }
    for highest, section in rates.items():
        found = make_config(schedule=section).schedule
        assert found.highest() == highest == max(found.rate(epoch / 100, 10) for epoch in range(1001))


def test_points_must_reach_the_last_epoch():
    with pytest.raises(ConfigError, match=r"schedule\.points end at epoch 15, but the phases last 16 epochs"):
        make_config(schedule={"name": "points", "points": IMAGENET}, phases=[{"epochs": 16, "batch_size": 100}])


def test_table_is_the_schedule_at_the_middle_of_every_update():
    found = make_config(phases=[{"epochs": 4, "batch_size": 50}], schedule={"name": "cyclic", "max_lr": 1, "peak": 0.5})
    table = lr_table(found, 200)
    up = [(u + 0.5) / 8 for u in range(8)]
    torch.testing.assert_close(table, torch.tensor(up + up[::-1]))
    assert table.dtype == torch.float32 and table.min() > 0


def test_table_when_the_images_do_not_fill_the_batches():
    """5 passes over 230 images in batches of 100 are 1150 / 100 = 11.5, so 12 updates."""
    rising = {"name": "points", "points": [[0, 0], [5, 5]]}
    found = make_config(schedule=rising, phases=[{"epochs": 5, "batch_size": 100}])
    table = lr_table(found, 230)
    torch.testing.assert_close(table, torch.tensor([(u + 0.5) / 12 * 5 for u in range(12)]))


def test_table_counts_the_replays_of_free():
    """10 epochs at 4 replays: 3 passes of 5 minibatches, each 4 updates; the schedule still spans the 10 epochs."""
    found = make_config("free", {"name": "multistep", "lr": 1.0}, replays=4)
    assert found.passes(found.phases[0]) == 3
    assert steps_in(found, found.phases[0], 500) == 15
    table = lr_table(found, 500)
    assert table.tolist() == pytest.approx([1.0] * 30 + [0.1] * 15 + [0.01] * 15)


def test_table_goes_through_the_phases():
    phases = [{"epochs": 6, "batch_size": 50}, {"epochs": 6, "batch_size": 25}, {"epochs": 3, "batch_size": 20}]
    found = make_config(schedule={"name": "points", "points": IMAGENET}, phases=phases)
    middles = [(u + 0.5) / 2 for u in range(12)]
    middles += [6 + (u + 0.5) / 4 for u in range(24)]
    middles += [12 + (u + 0.5) / 5 for u in range(15)]

    def rate(t):
        if t < 1:
            return 0.4 * t
        if t < 6:
            return 0.4 - 0.36 * (t - 1) / 5
        if t < 12:
            return 0.04 - 0.036 * (t - 6) / 6
        return 0.004 - 0.0036 * (t - 12) / 3

    torch.testing.assert_close(lr_table(found, 100), torch.tensor([rate(t) for t in middles]))


def test_warm_up_of_epsilon_is_linear_and_then_one():
    """2.5 epochs of 4 updates: after k + 1/2 updates it stands at (k + 1/2) / 10."""
    found = make_config("fgsm", phases=[{"epochs": 5, "batch_size": 25}], warmup=2.5)
    expected = [(k + 0.5) / 10 for k in range(10)] + [1.0] * 10
    torch.testing.assert_close(epsilon_scale_table(found, 100), torch.tensor(expected))
    without = make_config("fgsm", phases=[{"epochs": 5, "batch_size": 25}])
    assert epsilon_scale_table(without, 100).tolist() == [1.0] * 20


def test_warm_up_of_epsilon_with_replays():
    """2 epochs of `free` with 4 replays are half a pass: 4 of its 8 minibatches, 16 updates."""
    found = make_config("free", phases=[{"epochs": 4, "batch_size": 25}], warmup=2, replays=4)
    table = epsilon_scale_table(found, 200)
    torch.testing.assert_close(table, torch.tensor([(k + 0.5) / 16 for k in range(16)] + [1.0] * 16))
    assert len(table) == len(lr_table(found, 200))
