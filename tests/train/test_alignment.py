"""How well the gradients at both ends of an attack agree: against gradients taken one by one on a copy of the model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from method_steps import DECAY, EPSILON, LR, MOMENTUM, Counted, make_batch, make_model, section, shapes_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastrobust.attack.threat import Threat
from fastrobust.train import guard, learner, training
from fastrobust.train.alignment import UNKNOWN, alignment
from fastrobust.train.learner import Learner
from fastrobust.train.methods.base import Inputs
from fastrobust.train.optimizers import Sgd

UPDATES = 6


@pytest.fixture(autouse=True)
def every(monkeypatch):
    monkeypatch.setattr(learner, "EVERY", 1)


def watching(model, watched=True) -> Learner:
    return Learner(
        model, Sgd(name="sgd", momentum=MOMENTUM, weight_decay=DECAY), torch.full((UPDATES,), LR), watched=watched
    )


def take_step(learner, method, state, x, y, seed=0):
    torch.manual_seed(seed)
    method.step(learner, Inputs(x, y, torch.arange(len(x))), Threat(EPSILON), 1.0, state)


def gradients(model, points, y, loss) -> list[list[float]]:
    """Of each image, one by one."""
    found = []
    for point, label in zip(points, y, strict=True):
        leaf = point[None].clone().requires_grad_()
        loss(model(leaf), label[None], len(found)).backward()
        found.append(leaf.grad.flatten().tolist())
    return found


def mean_cosine(a, b) -> float:
    cosines = [
        sum(p * q for p, q in zip(g, h, strict=True)) / math.hypot(*g) / math.hypot(*h) for g, h in zip(a, b, strict=True)
    ]
    return sum(cosines) / len(cosines)


def plain(logits, y, i):
    return F.cross_entropy(logits, y)


def smoothed(logits, y, i):
    return F.cross_entropy(logits, y, label_smoothing=0.4)


@pytest.mark.parametrize(
    ("name", "keys", "attack", "start"),
    [
        ("fgsm", {"init": "zero"}, plain, -2),
        ("fgsm", {}, plain, -2),
        ("n_fgsm", {}, plain, -2),
        ("sora", {}, plain, -2),
        ("pgd", {"steps": 3, "alpha": 0.05}, plain, -2),  # the last step's
        ("gradalign", {}, plain, -3),  # not that of the random point
        ("fgsm_uap", {}, smoothed, -2),
    ],
)
def test_it_is_that_of_gradients_taken_one_by_one(name, keys, attack, start):
    model, method, (x, y) = Counted(make_model()), section(name, **keys), make_batch()
    learner, state = watching(model), method.state(shapes_of(x))
    for update in range(3):
        before, number = copy.deepcopy(model.network), len(model.inputs)
        take_step(learner, method, state, x, y, update)
        begun, end = model.inputs[number:][start], model.inputs[-1]
        at_start = before(begun).detach()

        def trained(logits, y, i, at_start=at_start):
            return smoothed(logits, y, i) + 10 * F.mse_loss(logits, at_start[i : i + 1])

        expected = mean_cosine(
            gradients(before, begun, y, attack), gradients(before, end, y, trained if name == "fgsm_uap" else attack)
        )
        assert learner.alignments[update].item() == pytest.approx(expected, abs=1e-4)
    assert expected < 0.9999
    assert learner.alignments[3:].tolist() == [UNKNOWN] * (UPDATES - 3)


def test_a_linear_model_is_aligned_and_a_turning_one_is_not():
    along = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert alignment(along, 7 * along).item() == pytest.approx(1)
    assert alignment(along, torch.tensor([[4.0, -3.0], [-1.0, 0.0]])).item() == pytest.approx(-0.5)
    in_half = alignment(1e3 * along.half(), 2e3 * along.half())  # whose products are none of half precision
    assert in_half.dtype == torch.float32 and in_half.item() == pytest.approx(1)


def test_what_has_no_direction_is_left_out():
    a, b = torch.ones(4, 3), torch.ones(4, 3)
    a[0], b[1], a[2, 0] = 0, math.inf, math.nan
    assert alignment(a, b).item() == pytest.approx(1)
    assert alignment(torch.zeros(2, 3), torch.ones(2, 3)).item() == UNKNOWN


@pytest.mark.parametrize(("name", "keys"), [("standard", {}), ("free", {"replays": 2})])
def test_where_there_are_no_two_gradients_nothing_is_known_or_spent(name, keys):
    method, (x, y), costs = section(name, **keys), make_batch(), []
    for watched in (False, True):
        learner = watching(make_model(), watched)
        with FlopCounterMode(display=False) as counter:
            take_step(learner, method, method.state(shapes_of(x)), x, y)
        costs.append(counter.get_total_flops())
    assert costs[0] == costs[1] and learner.alignments.tolist() == [UNKNOWN] * UPDATES


class Unhooked(nn.Module):
    """FlopCounterMode's module hooks refuse inputs that are leaves under autograd.grad: no hook sees this module, and its
    children see x + 0."""

    def __init__(self):
        super().__init__()
        self.network = make_model()

    def __call__(self, x):
        return self.network(x + 0)


def test_it_costs_the_gradient_of_the_first_layer():
    method, (x, y), costs = section("fgsm"), make_batch(), []
    for watched in (False, True):
        with FlopCounterMode(display=False) as counter:
            take_step(watching(Unhooked(), watched), method, {}, x, y)
        costs.append(counter.get_total_flops())
    assert costs[1] - costs[0] == 2 * len(x) * 4 * 2 * 3 * 3 * 4 * 4  # 2 -> 4 channels, 3 x 3, at 4 x 4 places


@pytest.mark.parametrize(
    "keys",
    [
        {"name": "fgsm"},
        {"name": "pgd", "steps": 2, "alpha": 0.05},
        {"name": "fgsm_uap"},
        {"name": "fgsm_pgi"},
        {"name": "liet"},
        {"name": "rs_cs"},
        {"name": "n_aaer"},
        {"name": "trades", "steps": 2},
        {"name": "gradalign"},
        {"name": "sora"},
        {"name": "awp", "begin": 0, "of": {"name": "fgsm"}},
    ],
    ids=lambda keys: keys["name"],
)
def test_looking_changes_no_bit_of_the_weights(keys):
    method, (x, y), found = section(**keys), make_batch(), []
    for watched in (False, True):
        model = make_model()
        learner, state = watching(model, watched), method.state(shapes_of(x))
        for update in range(3):
            take_step(learner, method, state, x, y, update)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)
    assert (learner.alignments[:3].abs() <= 1).all()


def test_most_steps_do_without(monkeypatch):
    """Also after a state was put back, which tells the place in the run."""
    monkeypatch.setattr(learner, "EVERY", 2)
    method, (x, y), model = section("fgsm"), make_batch(), make_model()
    whole, stopped, again = watching(model), watching(make_model()), watching(make_model(1))
    for update in range(5):
        take_step(whole, method, {}, x, y, update)
    for update in range(3):
        take_step(stopped, method, {}, x, y, update)
    again.load_state_dict(stopped.state_dict())
    for update in range(3, 5):
        take_step(again, method, {}, x, y, update)
    assert [a <= 1 for a in whole.alignments.tolist()] == [True, False, True, False, True, False]
    assert torch.equal(whole.alignments, again.alignments)


def test_an_epoch_records_the_mean_of_its_last_updates(config_of, begin, monkeypatch):
    """Epochs of 4, 3 and 3 updates; none looks into the one before."""
    monkeypatch.setattr(training, "WINDOW", 4)
    job = begin(config_of())
    job.train()
    noted = job.learner.alignments.tolist()
    assert len(noted) == 10 and max(noted) <= 1
    for record, first, end in zip(job.history, (0, 4, 7), (4, 7, 10), strict=True):
        assert record["alignment"] == pytest.approx(sum(noted[first:end]) / (end - first))
    job = begin(config_of(), "short")
    monkeypatch.setattr(training, "WINDOW", 2)
    job.train()
    assert [r["alignment"] for r in job.history] == pytest.approx([sum(noted[i - 2 : i]) / 2 for i in (4, 7, 10)])
    off = begin(config_of(guard={"action": "off"}), "off")
    off.train()
    assert "alignment" not in off.history[0] and len(off.learner.alignments) == 0


def test_low_alignment_is_a_warning_and_training_goes_on(config_of, begin, monkeypatch, capsys):
    """Whether an epoch is one to go back to does not depend on it."""
    values = iter([0.9] * 4 + [0.04] * 6)
    monkeypatch.setattr(learner, "alignment", lambda a, b: torch.tensor(next(values)))
    monkeypatch.setattr(training, "WINDOW", 3)
    monkeypatch.setattr(guard, "verdict", lambda *given: None)
    job = begin(config_of(guard={"action": "recover"}))
    job.train()
    told = "suspicious: the gradients at both ends of the attack hardly agree: alignment 0.04, at best 0.90"
    assert [record.get("warning") for record in job.history] == [None, told, told]
    assert f"warning: {told}" in capsys.readouterr().out
    assert job.position.stopped is None and job.good_epoch == 3


def test_of_a_batch_in_parts_the_last_part_tells(config_of, begin):
    job = begin(config_of(phases=[{"epochs": 3, "batch_size": 20, "resolution": 28, "accumulate": 2}]))
    told, tell = [], learner.alignment
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "alignment", lambda a, b: told.append((len(a), tell(a, b))) or told[-1][1])
        job.train()
    assert [n for n, _ in told] == [10] * 10
    assert job.learner.alignments.tolist() == [value.item() for _, value in told]
