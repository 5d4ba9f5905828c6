"""AutoAttack against the library's own evaluation, and what its parts need."""

from __future__ import annotations

import pytest
import torch
from attack_runs import EPSILON, cheaper, few_images, make_cheap, run
from torch import nn

import fastrobust
from fastrobust.attack import autoattack
from fastrobust.attack.base import Setting
from fastrobust.attack.threat import Threat
from fastrobust.attack.verdicts import correct, evaluating
from fastrobust.data.augment import to_unit
from fastrobust.data.sets import ImageSet
from fastrobust.evaluation import results
from fastrobust.runtime.errors import ConfigError


@pytest.fixture(scope="module")
def model(finished_run):
    return fastrobust.load(finished_run)


@pytest.fixture(scope="module")
def data():
    return few_images()


@pytest.fixture
def cheap(monkeypatch):
    make_cheap(monkeypatch)


class Thousand(nn.Module):
    """The model with so many classes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return nn.functional.pad(self.model(x), (0, 990), value=-9.0)


def test_autoattack_has_the_standard_budget(model):
    """Croce & Hein, 2020: 100 iterations, 1 restart, 9 targets, 5,000 queries."""
    images = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    setting = Setting(Thousand(model), images, Threat(EPSILON), 0.0, 9, 0)
    kinds = (autoattack.ApgdCe, autoattack.ApgdT, autoattack.FabT, autoattack.Square)
    assert tuple(kind.part for kind in kinds) == autoattack.PARTS
    apgd, targeted, fab, square = (kind(setting).attack for kind in kinds)
    assert (apgd.loss, apgd.n_iter, apgd.n_restarts, apgd.eot_iter) == ("ce", 100, 1, 1)
    assert (targeted.loss, targeted.n_iter, targeted.n_restarts, targeted.n_target_classes) == ("dlr-targeted", 100, 1, 9)
    assert (fab.targeted, fab.n_iter, fab.n_restarts, fab.n_target_classes) == (True, 100, 1, 9)
    assert (square.n_queries, square.n_restarts, square.loss) == (5000, 1, "margin")
    assert {attack.eps for attack in (apgd, targeted, fab, square)} == {EPSILON}
    assert {attack.norm for attack in (apgd, targeted, fab, square)} == {"Linf"}


@pytest.mark.parametrize("part", autoattack.PARTS)
def test_a_part_of_autoattack_finds_what_the_librarys_own_evaluation_finds(model, data, part, cheap):
    """In one batch, so that its random numbers are the same."""
    from pyautoattack import AutoAttack

    x = to_unit(data.images).contiguous()
    theirs = AutoAttack(model, attacks=[part], version="custom", eps=EPSILON, seed=5)
    for attack in (theirs.apgd, theirs.apgd_targeted, theirs.fab, theirs.square):
        cheaper(attack)
    with evaluating(model):
        adversarial, _ = theirs.run_standard_evaluation(x, data.labels, batch_size=60)
        expected = correct(model(adversarial), data.labels)
    record = run(model, data, [part], batch_size=60, seed=5)[0]
    assert torch.equal(record.clean & ~record.broken, expected)
    assert record.facts["refused"] == 0
    assert 0 < expected.sum() < record.clean.sum()


@pytest.mark.parametrize("kind", [autoattack.ApgdCe, autoattack.ApgdT])
def test_the_best_points_of_apgd_keep_no_others_alive(model, data, kind):
    attack = kind(Setting(model, data.images, Threat(EPSILON), 0.0, 60, 0))
    cheaper(attack.attack)
    attack.tick = lambda share: None
    single, found = attack.attack.attack_single_run, []

    def noted(*arguments):
        found.append(single(*arguments))
        return found[-1]

    attack.attack.attack_single_run = noted
    with evaluating(model):
        survived, _ = attack.run(to_unit(data.images), data.labels, 0)
    assert len(found) >= 1 and not survived.all()
    assert not any(tensor.requires_grad for tensors in found for tensor in tensors)


def test_autoattack_leaves_torchs_random_numbers_alone(model, data):
    state = torch.get_rng_state()
    run(model, ImageSet(data.images[:3], data.labels[:3], data.classes, ""), ["apgd-ce"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("classes, name", [(3, "apgd-t"), (2, "fab-t")])
def test_targeted_attacks_want_four_classes(classes, name):
    torch.manual_seed(0)
    small = nn.Sequential(nn.Flatten(), nn.Linear(12, classes))
    images = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    few = ImageSet(images, torch.zeros(2, dtype=torch.int64), tuple("ab"), "")
    with pytest.raises(ConfigError, match=f"{name} needs at least 4 classes, the model has {classes}"):
        run(small, few, [name])


def test_four_classes_are_enough_for_autoattack():
    torch.manual_seed(1)
    small = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    images = torch.randint(0, 256, (12, 3, 4, 4), dtype=torch.uint8)
    with torch.no_grad():
        labels = small(to_unit(images)).argmax(1)
    records = run(small, ImageSet(images, labels, tuple("abcd"), ""), ["apgd-ce", "apgd-t"], epsilon=0.05)
    assert 0 < results.worst_case(records).sum() < 12


def test_without_the_package_the_extra_is_named(model, data, monkeypatch, tmp_path):
    def absent(name):
        raise autoattack.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(autoattack.importlib.metadata, "version", absent)
    with pytest.raises(ConfigError, match=r"pip install 'pyautoattack>="):
        run(model, data, ["pgd-1-1", "apgd-ce"], folder=tmp_path)
    assert not list(tmp_path.iterdir()), "it is said before PGD's work"
    run(model, data, ["pgd-1-1"])
