"""Exact verification against oracles: every activation pattern in turn, linear programs, and plain attacks."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_files import real
from small_networks import SHAPE, decide, images, program, rows_at, tiny

import fastrobust
from fastrobust.attack import gradient
from fastrobust.attack.pgd import pgd
from fastrobust.attack.threat import Threat
from fastrobust.evaluation.trained import open_trained
from fastrobust.models import create
from fastrobust.verification import branch, milp, search
from fastrobust.verification.bounds import Bounder
from fastrobust.verification.decide import Decider
from fastrobust.verification.lowering import lower_model
from fastrobust.verification.store import Verdicts
from tests.gpusim import sim

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


def brute_force(around, question: torch.Tensor) -> float:
    """The least margin in the box: every pattern of signs by its own linear program."""
    return min(program(around, question, p) for p in itertools.product((-1, 1), repeat=len(around.lower)))


@pytest.mark.parametrize("seed", range(12))
def test_branch_and_bound_and_the_integer_program_agree_with_brute_force(seed):
    decider = Decider(tiny(seed, scale=3.0, deep=False), SHAPE, (0.05, 0.2)[seed % 2])
    x = images(1, 100 + seed)[0].float() / 255
    label = decider.model(x[None]).argmax()
    _, bounder, questions = decider.margins(x, label, 5)
    others = [c for c in range(3) if c != label]
    for question, other in zip(questions, others, strict=True):
        least = brute_force(bounder.reduced, question)
        truth = "verified" if least > branch.TOLERANCE else "broken"

        def wrong(points, other=other):
            logits = decider.network(bounder.reduced.images(points))
            return logits[:, label] <= logits[:, other] + branch.TOLERANCE

        left, point, _ = branch.decide(bounder, question[None], time.monotonic() + 30, wrong)
        assert not left and ("verified" if point is None else "broken") == truth
        assert point is None or wrong(point[None]).all()
        kind, point = milp.decide(bounder.reduced, question, branch.TOLERANCE, 30)
        assert {"verified": "verified", "point": "broken"}[kind] == truth
        assert point is None or wrong(point[None] * (1 - 1e-12)).all()


@pytest.mark.parametrize("factor", [2.0**-30, 2.0**30, 2.0**40])
def test_layers_in_other_units_do_not_change_the_programs_answer(factor):
    """The first layer times a factor and the last one divided by it is the same function in exact arithmetic."""
    answers = []
    for seed in range(12):
        model = tiny(seed, scale=3.0, deep=False)
        x = images(1, 100 + seed)[0].float() / 255
        label = model(x[None]).argmax()
        _, bounder, questions = Decider(model, SHAPE, (0.05, 0.2)[seed % 2]).margins(x, label, 5)
        least = [brute_force(bounder.reduced, question) for question in questions]
        with torch.no_grad():
            model.network[0].weight.mul_(factor), model.network[0].bias.mul_(factor), model.network[-1].weight.div_(factor)
        _, bounder, questions = Decider(model, SHAPE, (0.05, 0.2)[seed % 2]).margins(x, label, 5)
        for question, lowest in zip(questions, least, strict=True):
            kind, _ = milp.decide(bounder.reduced, question, branch.TOLERANCE, 30)
            assert kind == ("verified" if lowest > branch.TOLERANCE else "point")
            answers.append(kind)
    assert min(answers.count(kind) for kind in ("verified", "point")) > 3


def test_the_program_at_the_end_agrees_with_brute_force(monkeypatch):
    """What branch and bound leaves is given to HiGHS with all that is known of the least point: signs, ends and spans. With
    these its answer is that of every pattern of signs, and it looks for a point that rounding leaves broken."""
    verdicts, known = [], []
    ask = milp.decide

    def noted(reduced, row, tolerance, seconds, signs, ends, span):
        tighter = (span[0] > reduced.lower) | (span[1] < reduced.upper)
        known.append((int((signs != 0).sum()), int((ends != 0).sum()), int(tighter.sum())))
        return ask(reduced, row, tolerance, seconds, signs, ends, span)

    monkeypatch.setattr(milp, "decide", noted)
    for name in ("STEPS", "ANEW_STEPS"):
        monkeypatch.setattr(branch, name, 1)
    for seed in range(24):
        decider = Decider(tiny(seed, scale=3.0, deep=False), SHAPE, (0.05, 0.2)[seed % 2])
        x = images(1, 100 + seed)[0].float() / 255
        label = decider.model(x[None]).argmax()
        _, bounder, questions = decider.margins(x, label, 5)
        for question in questions:
            least = brute_force(bounder.reduced, question)
            kind, point = branch.program(bounder, question, 30)
            assert kind == ("verified" if least > branch.TOLERANCE else "point")
            if point is not None and least < -2 * milp.BROKEN:
                r = bounder.reduced.inputs
                outputs = torch.cat(rows_at(bounder.reduced, bounder.reduced.images(point[None])), 1).clamp(min=0)[0]
                value = question[:r] @ point + question[r] + question[r + 1 :] @ outputs
                assert value < -milp.BROKEN / 2
            verdicts.append(kind)
    assert min(verdicts.count(kind) for kind in ("verified", "point")) > 5
    assert all(sum(count) > 0 for count in zip(*known, strict=True))


@pytest.mark.parametrize("few", [True, False])
def test_few_open_relus_leave_two_thirds_of_the_time_to_the_program(monkeypatch, few):
    model, now, told = tiny(0, scale=6.0), [0.0], {}

    def branched(bounder, rows, until, broken, beside):
        told["branch and bound"] = until - now[0]
        now[0] = until
        return list(range(len(rows))), None, 7

    def program(bounder, row, seconds):
        told["program"] = seconds
        return "verified", None

    monkeypatch.setattr(search, "FEW", 10**6 if few else 0)
    monkeypatch.setattr(branch, "decide", branched)
    monkeypatch.setattr(branch, "program", program)
    monkeypatch.setattr(Decider, "attack", lambda self, x, *_, **__: (torch.zeros(len(x), dtype=torch.bool), x))
    monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=lambda: now[0]))
    decider, x = Decider(model, SHAPE, 0.3), images(1)[0].float() / 255
    _, bounder, questions = decider.margins(x, model(x[None]).argmax(1)[0], 0)
    nothing = lambda todo: torch.zeros(0)
    found = search.decide(torch.full((2,), -1.0), bounder, questions, 60.0, nothing, nothing, nothing)
    assert told == ({"branch and bound": 20.0, "program": 40.0} if few else {"branch and bound": 60.0, "program": 0.0})
    assert (found.answer, found.by, found.domains) == (search.HOLDS, "mixed-integer program", 7)


@pytest.mark.parametrize("answers", [True, False])
def test_linear_programs_answer_where_the_optimiser_does_not(answers, monkeypatch):
    """Without a step of the optimiser domains are left with nothing to split. HiGHS settles them as brute force does; where
    it has no answer the class stays open, and is not asked about again."""
    for name in ("STEPS", "MORE", "END_STEPS", "ANEW_STEPS"):
        monkeypatch.setattr(branch, name, 0)
    asked, ask = [], milp.decide

    def decide_program(reduced, row, tolerance, seconds, *part):
        asked.append(row)
        return ask(reduced, row, tolerance, seconds, *part) if answers else ("timeout", None)

    monkeypatch.setattr(branch.milp, "decide", decide_program)
    verdicts = []
    for seed in range(12):
        decider = Decider(tiny(seed, scale=3.0, deep=False), SHAPE, (0.05, 0.2)[seed % 2])
        x = images(1, 100 + seed)[0].float() / 255
        label, nothing = decider.model(x[None]).argmax(), lambda points: torch.zeros(len(points), dtype=torch.bool)
        _, bounder, questions = decider.margins(x, label, 5)
        for question in questions:
            before = len(asked)
            left, point, _ = branch.decide(bounder, question[None], time.monotonic() + 30, nothing)
            assert point is None
            if answers:
                assert left == ([] if brute_force(bounder.reduced, question) > branch.TOLERANCE else [0])
            elif len(asked) > before:
                assert left == [0] and len(asked) == before + 1
            verdicts.append(len(left))
    assert asked and set(verdicts) == {0, 1}


def test_the_integer_program_of_fixed_signs_is_the_linear_program_of_that_pattern():
    answers = set()
    for seed in range(6):
        decider = Decider(tiny(seed, scale=3.0, deep=False), SHAPE, 0.1)
        _, bounder, questions = decider.margins(images(1, seed)[0].float() / 255, torch.tensor(0), 5)
        for pattern in itertools.product((-1, 1), repeat=len(bounder.reduced.lower)):
            least, signs = program(bounder.reduced, questions[0], pattern), torch.tensor(pattern, dtype=torch.int8)
            kind, point = milp.decide(bounder.reduced, questions[0], branch.TOLERANCE, 30, signs)
            assert kind == ("verified" if least > branch.TOLERANCE else "point")
            if point is not None:
                z = torch.cat(rows_at(bounder.reduced, bounder.reduced.images(point[None])), 1)
                assert (z * signs >= -1e-6).all()
            answers.add(kind if least < np.inf else "empty")
    assert answers == {"empty", "verified", "point"}


def test_both_verdicts_occur_in_the_comparison_with_brute_force():
    verdicts = []
    for seed in range(12):
        decider = Decider(tiny(seed, scale=3.0, deep=False), SHAPE, (0.05, 0.2)[seed % 2])
        x = images(1, 100 + seed)
        label = decider.model(x.float() / 255).argmax(1)
        verdicts += [v.verdict for v in decide(decider, [0], x, label, 10)]
    assert verdicts.count("verified") >= 2 and verdicts.count("falsified") >= 2


def test_verdicts_never_contradict_an_attack_and_witnesses_are_adversarial():
    model = tiny(0, scale=2.5)
    x = images(8, 5)
    labels = model(x.float() / 255).argmax(1)
    labels[0] = (labels[0] + 1) % 3
    kinds = set()
    for epsilon in (0.06, 0.1):
        decider = Decider(model, SHAPE, epsilon)
        verdicts = decide(decider, list(range(8)), x, labels, 10.0)
        assert [v.index for v in verdicts] == list(range(8)) and verdicts[0].verdict == "misclassified"
        kinds |= {v.verdict for v in verdicts}
        robust = pgd(model, x, labels, threat=Threat(epsilon), alpha=epsilon / 8, steps=40, restarts=5).robust
        for v in verdicts:
            assert v.label == labels[v.index] and (v.witness is not None) == (v.verdict == "falsified")
            if v.verdict == "verified":
                assert robust[v.index]
            if v.verdict == "falsified":
                point, image = v.witness.double(), x[v.index].double() / 255
                assert v.witness.dtype == torch.float32 and v.witness.min() >= 0 and v.witness.max() <= 1
                assert (point - (x[v.index].float() / 255).double()).abs().max() <= epsilon
                assert (point - image).abs().max() <= epsilon + 1e-7
                assert model(v.witness[None]).argmax() != v.label
    assert kinds == {"misclassified", "verified", "falsified"}


@pytest.mark.parametrize("device", ["cpu:0", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_verdicts_are_the_same_on_another_device(device):
    """cpu:0 is the CPU by another name: branch and bound is carried there and back as to a GPU."""
    if device == "cuda" and (sim.HERE or not torch.cuda.is_available()):
        pytest.skip("needs a CUDA GPU")
    model, x = tiny(0, scale=6.0), images(24, 5)[[7, 9, 23]]
    labels = model(x.float() / 255).argmax(1)
    here = decide(Decider(model, SHAPE, 0.1), list(range(3)), x, labels, 60.0)
    there = decide(Decider(model, SHAPE, 0.1, device=torch.device(device)), list(range(3)), x, labels, 60.0)
    assert [v.verdict for v in there] == [v.verdict for v in here]
    assert {v.verdict for v in here if v.domains} == {"verified", "falsified"}  # both by branch and bound


def test_no_time_gives_timeouts_not_wrong_verdicts():
    model, x = tiny(0, scale=6.0), images(24, 5)  # about half of them are beyond plain bounds and attacks
    labels = model(x.float() / 255).argmax(1)
    long = decide(Decider(model, SHAPE, 0.1), list(range(24)), x, labels, 10.0)
    short = decide(Decider(model, SHAPE, 0.1), list(range(24)), x, labels, 1e-9)
    assert any(v.verdict == "timeout" for v in short)
    assert all(a.verdict == b.verdict or a.verdict == "timeout" for a, b in zip(short, long, strict=True))


def test_what_rounding_adds_to_a_forward_pass_is_far_below_the_tolerance():
    model = create("mnist_net", channels=1, classes=10, mean=(0.0,), std=(1.0,))
    x = torch.rand(500, 1, 28, 28)
    network = lower_model(model, (1, 28, 28))
    for p in (model,):
        logits = p(x)
    scale = logits.abs().max()
    assert ((network(x) - logits).abs().max() / scale) < 1e-5


@pytest.mark.parametrize("timeout", [0.5, 3.5, 40.5, 200.5])
def test_a_time_limit_is_kept_from_the_first_bounds_on(monkeypatch, timeout):
    """By a clock that only moves as bounds are computed and gradients taken, a second for each."""
    model = tiny(3)
    decider, x, now = Decider(model, SHAPE, 0.3), images(1)[0], [0.0]
    label = model(x[None].float() / 255).argmax(1)[0]

    def slow(function):
        def call(*arguments, **named):
            now[0] += 1
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Bounder, "below", slow(Bounder.below))
    monkeypatch.setattr(gradient, "step", slow(gradient.step))
    monkeypatch.setattr(Decider, "confirmed", lambda self, x, label, points: torch.zeros(len(points), dtype=torch.bool))
    monkeypatch.setattr(milp, "decide", lambda *arguments: ("unknown", None))
    monkeypatch.setattr(branch, "TOLERANCE", 1e6)  # nothing is ever proved
    verdict = decider.search(0, x, label, timeout)
    assert verdict.verdict == "timeout"
    assert timeout < now[0] <= timeout + 40, "what is under way is ended: a few bounds for each layer and target"
    if timeout < 1:
        assert verdict.by == "optimised bounds"


def test_verdicts_of_mnist_images_are_those_of_the_records():
    """benchmarks/results/mnist/mnist_fgsm_ibp_0_verified_0.3_first_500.json counts them; these are its first 20."""
    trained = open_trained(RESULTS / "mnist/mnist_fgsm_ibp_0.safetensors", str(real("mnist")))
    data = trained.images()
    verdicts = decide(Decider(trained.model, (1, 28, 28), 0.3), list(range(20)), data.images[:20], data.labels[:20], 60)
    odd = {v.index: v.verdict for v in verdicts if v.verdict != "verified"}
    assert odd == {6: "falsified", 8: "misclassified", 18: "falsified"}


def test_a_verdict_is_kept_before_the_next_image_is_searched(tmp_path, monkeypatch):
    """Of eight images, looked at two by two, that the search does not decide in two seconds."""
    trained = open_trained(RESULTS / "mnist/mnist_fgsm_warmup_0.safetensors", str(real("mnist")))
    data, add = trained.images(), Verdicts.add

    def add_and_stop(self, verdicts):
        add(self, verdicts)
        raise KeyboardInterrupt

    monkeypatch.setattr(Verdicts, "add", add_and_stop)
    with pytest.raises(KeyboardInterrupt):
        same = (data.images[19:20].expand(8, -1, -1, -1), data.labels[19:20].expand(8))
        fastrobust.verify(trained.model, *same, epsilon=0.3, timeout=2, workers=1, output=tmp_path)
    (line,) = (tmp_path / "verdicts.jsonl").read_text().splitlines()
    assert json.loads(line)["verdict"] == "timeout"
