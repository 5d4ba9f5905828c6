"""Intervals, keeping, resuming and merging results, and the evaluate command. The oracles: the same work without an
interruption, and sums by hand."""

from __future__ import annotations

import itertools
import json
import math
import shutil

import pytest
import torch
from attack_runs import EPSILON, few_images, make_cheap, run
from torch import nn

import fastrobust
from fastrobust.__main__ import main as cli
from fastrobust.attack import autoattack
from fastrobust.attack.pgd import Pgd
from fastrobust.data.sets import ImageSet
from fastrobust.evaluation import accuracy, results
from fastrobust.evaluation.accuracy import attack_names
from fastrobust.evaluation.answers import alike, answers
from fastrobust.runtime.errors import RunError


@pytest.fixture(scope="module")
def model(finished_run):
    return fastrobust.load(finished_run)


@pytest.fixture(scope="module")
def data():
    return few_images()


@pytest.fixture
def cheap(monkeypatch):
    make_cheap(monkeypatch)


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


class Scaled(nn.Module):
    """The same weights, other code: nothing is classified otherwise, but the gradient vanishes."""

    def __init__(self, model, scale):
        super().__init__()
        self.__dict__["inner"], self.scale = model, scale

    def forward(self, x):
        return self.scale * self.inner(x)

    def state_dict(self, *arguments, **options):
        return self.inner.state_dict(*arguments, **options)

    def parameters(self, recurse=True):
        return self.inner.parameters(recurse)


def test_what_is_kept_of_other_code_with_the_same_weights_does_not_count(model, data, tmp_path, capsys):
    options = {"names": ["pgd-3-1"], "folder": tmp_path}
    (hidden,) = run(Scaled(model, 3e4), data, **options)
    assert "attacked anew" not in capsys.readouterr().err
    (found,), (expected,) = run(model, data, **options), run(model, data, ["pgd-3-1"])
    assert "the model's code is not what" in capsys.readouterr().err
    assert hidden.settings == found.settings and int(hidden.broken.sum()) < int(found.broken.sum())
    assert torch.equal(found.broken, expected.broken)
    run(model, data, **options)
    assert "attacked anew" not in capsys.readouterr().err


def test_answers_of_one_network_are_alike_and_those_of_others_are_not():
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)]
    net, shape = nn.Sequential(*layers), (3, 2, 2)
    found = answers(net, shape)
    assert len(found) == 12 and alike(found, answers(net, shape)) and alike(found, None)
    assert alike(found, answers(net.double().float(), shape))
    for other in (nn.LeakyReLU(0.3), nn.Tanh()):
        assert not alike(found, answers(nn.Sequential(*layers[:2], other, layers[3]), shape))
    assert not alike(found, answers(nn.Sequential(*layers, nn.Softmax(1)), shape))
    assert not alike(found, found[:-1])


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
    assert len(list(tmp_path.iterdir())) == 1  # one that found nothing leaves no record
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


def test_the_worst_case_tells_attacks_that_were_not_finished_apart(copied_run, capsys):
    command(capsys, copied_run, "--attack", "pgd-2-1", "--limit", 10)
    (kept,) = (copied_run / results.FOLDER).iterdir()
    record = results.read(kept)
    record.facts["finished"] = False
    kept.unlink()
    record.save(copied_run / results.FOLDER)
    found, out = command(capsys, copied_run, "--attack", "pgd-1-1", "--limit", 10)
    assert found["worst_case"]["attacks"] == ["pgd-1-1"] and found["worst_case"]["not_finished"] == ["pgd-2-1"]
    assert "over pgd-1-1; not finished: pgd-2-1" in out


def test_where_results_cannot_be_kept_it_is_said(copied_run, capsys):
    (copied_run / results.FOLDER).write_text("a file")
    assert cli(["evaluate", str(copied_run), "--attack", "pgd-1-1", "--limit", "10", "--device", "cpu"]) == 0
    found = capsys.readouterr()
    assert "the results are not kept" in found.err
    assert "robust accuracy" in found.out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--attack", "pdg-50-10"], "fab-t, square, autoattack, apgd; did you mean 'pgd'?"),
        (["--attack", "autoatack"], "'autoatack' is not one of pgd, pgd-t, apgd-ce"),
        (["--attack", "autoatack"], "did you mean 'autoattack'?"),
        (["--attack", "pgd-0-1"], "pgd is written pgd-STEPS-RESTARTS"),
        (["--attack", "pgd-5-1,"], "attack: '' is not one of pgd, pgd-t, apgd-ce"),
        (["--attack", "pgd-5-1", "--steps", "3"], "stand in the name of the attack"),
    ],
)
def test_a_mistake_in_an_attack_is_explained(copied_run, capsys, arguments, message):
    assert cli(["evaluate", str(copied_run), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and "Traceback" not in err


OWN = """
import torch
from fastrobust.attack.base import Attack

class Corner(Attack):
    @classmethod
    def check(cls, numbers):
        assert numbers == (3,)

    def run(self, x, y, start):
        points = x + self.setting.threat.radius * torch.where(x < 0.5, 1, -1)
        with torch.no_grad():
            return self.model(points).argmax(1) == y, points
"""


def test_an_attack_of_ones_own_is_named_as_it_was_given(copied_run, capsys, monkeypatch, tmp_path):
    (tmp_path / "own_corner.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    names = ["own_corner:Corner-3", "pgd-3-1"]
    found, _ = command(capsys, copied_run, "--attack", "own_corner:Corner-3, PGD-3-1", "--limit", 60, "--epsilon", 0.3)
    assert found["attack"] == ",".join(names) and [line["attack"] for line in found["attacks"]] == names
    kept = {r.settings["attack"]: r for r in results.read_all(copied_run / results.FOLDER)}
    assert list(kept) == names and kept[names[0]].settings["made_by"].startswith("own_corner ")
    assert 0 < kept[names[0]].broken.sum() < kept[names[0]].clean.sum()
    assert torch.equal(kept["pgd-3-1"].attacked, kept[names[0]].clean & ~kept[names[0]].broken)


def test_an_attack_in_capitals_is_the_same_attack(copied_run, capsys):
    found = [command(capsys, copied_run, "--attack", name, "--limit", 20)[0] for name in ("PGD-2-2", "pgd-2-2")]
    assert found[0] == found[1] and "robust_accuracy_after_one_restart" in found[0]


def test_names_of_attacks():
    assert attack_names("pgd-50-10, AutoAttack,square") == ["pgd-50-10", *autoattack.PARTS]
    assert attack_names("apgd") == ["apgd-ce", "apgd-t"]


def test_robust_accuracy_falls_with_every_attack_of_a_chain(model, data):
    records = run(model, data, ["pgd-1-1", "pgd-3-1", "pgd-10-2"])
    left = [int(results.worst_case(records[:i]).sum()) for i in range(1, 4)]
    assert all(b <= a for a, b in itertools.pairwise(left)) and left[-1] < left[0]
