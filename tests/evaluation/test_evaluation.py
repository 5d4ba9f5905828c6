"""What counts as broken, resuming, merging, and AutoAttack. The oracles: attacks that lie, the same work without an
interruption, and the library's own evaluation."""

from __future__ import annotations

import itertools
import json
import math
import shutil

import pytest
import torch
from conftest import bar_images
from torch import nn

import fastrobust
from fastrobust.__main__ import main as cli
from fastrobust.attack import autoattack
from fastrobust.attack.base import Setting
from fastrobust.attack.pgd import Pgd, StaticAttack
from fastrobust.attack.rounds import run_rounds
from fastrobust.attack.threat import Threat
from fastrobust.attack.verdicts import breaks, correct, evaluating
from fastrobust.data.augment import to_unit
from fastrobust.data.sets import ImageSet
from fastrobust.evaluation import accuracy, results
from fastrobust.evaluation.accuracy import attack_names, run_attacks
from fastrobust.runtime.errors import ConfigError, RunError

EPSILON = 0.1


@pytest.fixture(scope="module")
def model(finished_run):
    return fastrobust.load(finished_run)


@pytest.fixture(scope="module")
def data():
    """60 fresh images of bars; every ninth label is wrong."""
    images, labels = map(torch.from_numpy, bar_images(60, 99))
    labels[::9] = (labels[::9] + 1) % 10
    return ImageSet(images.permute(0, 3, 1, 2), labels, tuple("0123456789"), "")


def run(model, data, names, **changes):
    settings = {"epsilon": EPSILON, "alpha": EPSILON / 4, "batch_size": 16, "seed": 0}
    return run_attacks(model, data, names, **(settings | changes))


# ---- what counts


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

    rounds = 2

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
        pgd.graph = StaticAttack(model, x, Threat(EPSILON), EPSILON / 4)
    with evaluating(model):
        survived, points = pgd.run(x[:30], y[:30], start[:30])
        assert 3 < survived.sum() < 27
        held = breaks(model, x[:30], y[:30], points, Threat(EPSILON))
    assert torch.equal(held, ~survived)
    assert (points - x[:30]).abs().amax() <= EPSILON + 1e-6


# ---- intervals


@pytest.mark.parametrize("n", [1, 7, 100, 10_000])
def test_an_interval_ends_where_the_score_test_begins_to_reject(n):
    for k in {0, 1, n // 3, n - 1, n}:
        low, high = results.wilson(k, n)
        assert 0 <= low <= k / n <= high <= 1
        for end, trivial in ((low, 0.0), (high, 1.0)):
            if end != trivial:
                assert abs(k / n - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), rel=1e-5)
    assert results.wilson(0, n)[0] == 0 and results.wilson(n, n)[1] == 1


def test_an_interval_of_the_literature():
    assert results.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe (1998), table I


# ---- keeping, resuming, merging


class Stopped(Exception):
    pass


@pytest.mark.parametrize("names", [["pgd-3-3"], ["apgd-ce", "square"]], ids=["pgd", "chain"])
def test_an_interrupted_attack_gives_the_same_verdicts_and_repeats_nothing(model, data, names, tmp_path, monkeypatch, cheap):
    work = []
    monkeypatch.setattr(accuracy, "SAVE_EVERY", -1.0)
    for kind in (Pgd, autoattack.Part):

        def counted(self, x, y, start, original=kind.run):
            work.append(x.clone())
            return original(self, x, y, start)

        monkeypatch.setattr(kind, "run", counted)
    expected = run(model, data, names)
    batches = list(work)
    assert len(batches) >= 6
    work.clear()

    folder, original, stops = tmp_path / "parts", results.Record.save, 0
    folder.mkdir()
    left = [0]

    def failing(self, where):
        original(self, where)
        left[0] -= 1
        if left[0] == 0:
            raise Stopped

    monkeypatch.setattr(results.Record, "save", failing)
    while True:
        left[0] = 2  # the first batch's save goes well, then the work stops
        try:
            found = run(model, data, names, folder=folder)
            break
        except Stopped:
            stops += 1
        assert stops < 50
    assert stops >= 3
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.broken, b.broken) and torch.equal(a.attacked, b.attacked) and torch.equal(a.clean, b.clean)
        assert b.facts["finished"] and b.facts["seconds"] > 0
    assert 0 < sum(int(r.broken.sum()) for r in found) < int(found[0].clean.sum())
    assert len(work) == len(batches)
    assert all(torch.equal(a, b) for a, b in zip(work, batches, strict=True))


def test_merging_leaves_robust_what_no_attack_broke(model, data, tmp_path):
    one = run(model, data, ["pgd-1-2"], folder=tmp_path, epsilon=0.3, alpha=0.05)
    two = run(model, data, ["pgd-1-2"], folder=tmp_path, epsilon=0.3, alpha=0.05, seed=3)
    merged = results.worst_case(one + two)
    by_hand = [c and not (a or b) for c, a, b in zip(one[0].clean, one[0].broken, two[0].broken, strict=True)]
    assert merged.tolist() == by_hand
    two[0].broken ^= torch.arange(60) % 7 == 3  # as if it had found others
    two[0].save(tmp_path)
    merged = results.worst_case(one + two)
    assert merged.tolist() == [r and not b for r, b in zip(results.worst_case(one), two[0].broken, strict=True)]
    assert merged.sum() < min(results.worst_case(r).sum() for r in (one, two))
    kept = results.stored(tmp_path, one[0].settings["weights"], one[0].settings["data"], 0.3)
    assert len(kept) == 2
    assert torch.equal(results.worst_case(kept), merged)
    chain = run(model, data, ["pgd-1-1", "pgd-5-1"])
    assert torch.equal(chain[1].attacked, chain[0].clean & ~chain[0].broken)
    assert not (chain[1].broken & ~chain[1].attacked).any()


@pytest.mark.parametrize("other", ["data", "epsilon", "weights"])
def test_records_about_different_things_are_not_merged(model, data, tmp_path, other):
    record = run(model, data, ["pgd-1-1"], folder=tmp_path)
    changes = {"epsilon": EPSILON * (2 if other == "epsilon" else 1), "folder": tmp_path}
    if other == "data":
        data = ImageSet(data.images.flip(0), data.labels.flip(0), data.classes, "")
    if other == "weights":
        model = nn.Sequential(model, nn.Linear(10, 10))
    another = run(model, data, ["pgd-1-1"], **changes)
    with pytest.raises(ValueError, match="2 different"):
        results.worst_case(record + another)
    s = another[0].settings
    assert len(results.stored(tmp_path, s["weights"], s["data"], s["epsilon"])) == 1


def test_a_finished_attack_is_not_run_again_unless_asked(model, data, tmp_path, monkeypatch):
    first = run(model, data, ["pgd-3-1"], folder=tmp_path)[0]
    monkeypatch.setattr(accuracy, "run_rounds", lambda *a, **k: pytest.fail("attacked again"))
    again = run(model, data, ["pgd-3-1"], folder=tmp_path)[0]
    assert torch.equal(first.broken, again.broken) and again.facts == first.facts
    with pytest.raises(pytest.fail.Exception):  # the second attack of a chain; the first is there
        run(model, data, ["pgd-3-1", "apgd-ce"], folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    for changes in ({"fresh": True}, {"seed": 1}, {"alpha": 0.03}, {"epsilon": 0.2}):
        with pytest.raises(pytest.fail.Exception):
            run(model, data, ["pgd-3-1"], **({"folder": tmp_path} | changes))


def test_a_damaged_record_is_an_explained_error(model, data, tmp_path):
    record = run(model, data, ["pgd-1-1"], folder=tmp_path)[0]
    path = record.path(tmp_path)
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[:50], whole.replace(b"BOOL", b"U8  ", 1)):
        path.write_bytes(content)
        with pytest.raises(RunError, match="is damaged: delete it"):
            results.read(path)


# ---- AutoAttack


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


def cheaper(attack):
    """A smaller budget, the same for both sides of a comparison."""
    for name, value in {"n_target_classes": 2, "n_queries": 80, "n_restarts": 1}.items():
        if hasattr(attack, name):
            setattr(attack, name, value)
    attack.n_iter = min(20, getattr(attack, "n_iter", 0))


@pytest.fixture
def cheap(monkeypatch):
    build = accuracy.build

    def cheaply(*arguments):
        attack = build(*arguments)
        if isinstance(attack, autoattack.Part):
            cheaper(attack.attack)
        return attack

    monkeypatch.setattr(accuracy, "build", cheaply)


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


def test_without_the_package_the_extra_is_named(model, data, monkeypatch):
    def absent(name):
        raise autoattack.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(autoattack.importlib.metadata, "version", absent)
    with pytest.raises(ConfigError, match=r"pip install 'fastrobust\[autoattack\]'"):
        run(model, data, ["apgd-ce"])
    run(model, data, ["pgd-1-1"])


# ---- the command


@pytest.fixture
def copied_run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns(results.FOLDER))


def command(capsys, *arguments) -> tuple[dict, str]:
    assert cli(["evaluate", *map(str, arguments), "--device", "cpu", "--json"]) == 0
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


def test_autoattack_finds_no_less_than_pgd_and_pgd_no_less_than_nothing(copied_run, capsys, cheap):
    """By the command, and merged afterwards."""
    limit = ["--limit", 18, "--batch-size", 18, "--epsilon", 0.1]
    pgd, _ = command(capsys, copied_run, "--attack", "pgd-10-2", *limit)
    auto, out = command(capsys, copied_run, "--attack", "AutoAttack", *limit)
    assert auto["robust_accuracy"] <= pgd["robust_accuracy"] <= pgd["clean_accuracy"] == auto["clean_accuracy"]
    assert 0 < auto["robust_accuracy"] < auto["clean_accuracy"]
    assert [line["attack"] for line in auto["attacks"]] == list(autoattack.PARTS)
    robust = round(auto["clean_accuracy"] * 18)
    for line in auto["attacks"]:
        assert line["attacked"] == robust
        robust -= line["broken"]
    assert robust / 18 == auto["robust_accuracy"]
    assert auto["worst_case"]["attacks"] == ["apgd-ce", "apgd-t", "fab-t", "pgd-10-2", "square"]
    assert auto["worst_case"]["robust_accuracy"] <= auto["robust_accuracy"]
    assert "worst case" in out and "n = 18" in out
    assert auto["robust_interval"] == list(results.wilson(robust, 18))
    again, _ = command(capsys, copied_run, "--attack", "autoattack", *limit)
    assert again == auto  # kept


def test_results_are_kept_in_the_run_and_not_beside_a_file(copied_run, tmp_path, capsys):
    command(capsys, copied_run, "--attack", "pgd-1-1", "--limit", 10)
    (kept,) = (copied_run / results.FOLDER).iterdir()
    record = results.read(kept)
    assert record.facts["finished"] and record.settings["examples"] == 10
    alone = shutil.copy(copied_run / "model.safetensors", tmp_path / "weights.safetensors")
    command(capsys, alone, "--attack", "pgd-1-1", "--limit", 10)
    assert not (tmp_path / results.FOLDER).exists()


def test_where_results_cannot_be_kept_it_is_said(copied_run, capsys):
    (copied_run / results.FOLDER).write_text("a file")
    assert cli(["evaluate", str(copied_run), "--attack", "pgd-1-1", "--limit", "10", "--device", "cpu"]) == 0
    found = capsys.readouterr()
    assert "the results are not kept" in found.err
    assert "robust accuracy" in found.out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--attack", "pdg-50-10"], "attack: 'pdg' is not one of pgd, apgd-ce, apgd-t, fab-t, square; did you mean 'pgd'?"),
        (["--attack", "pgd-0-1"], "pgd is written pgd-STEPS-RESTARTS"),
        (["--attack", "pgd-5-1,"], "attack: '' is not one of pgd, apgd-ce"),
        (["--attack", "pgd-5-1", "--steps", "3"], "stand in the name of the attack"),
    ],
)
def test_a_mistake_in_an_attack_is_explained(copied_run, capsys, arguments, message):
    assert cli(["evaluate", str(copied_run), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and "Traceback" not in err


def test_names_of_attacks():
    assert attack_names("pgd-50-10, AutoAttack,square") == ["pgd-50-10", *autoattack.PARTS]
    assert attack_names("apgd") == ["apgd-ce", "apgd-t"]


def test_robust_accuracy_falls_with_every_attack_of_a_chain(model, data):
    records = run(model, data, ["pgd-1-1", "pgd-3-1", "pgd-10-2"])
    left = [int(results.worst_case(records[:i]).sum()) for i in range(1, 4)]
    assert all(b <= a for a, b in itertools.pairwise(left)) and left[-1] < left[0]
