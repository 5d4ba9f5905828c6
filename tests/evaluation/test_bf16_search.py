"""A search in bf16 on a CPU: what it breaks is broken in fp32, its results are kept apart from those of one in fp32, and
figures say which it was. The oracles: networks whose passes in bf16 are known to be wrong, and the search in fp32."""

from __future__ import annotations

import json

import pytest
import torch
from attack_runs import EPSILON, few_images, make_cheap, run
from torch import nn

import fastrobust
from fastrobust.__main__ import main as cli
from fastrobust.attack import gradient
from fastrobust.attack.pgd import attack
from fastrobust.attack.threat import Threat
from fastrobust.attack.verdicts import breaks, classified, evaluating
from fastrobust.data.augment import to_unit
from fastrobust.evaluation import accuracy
from fastrobust.evaluation.accuracy import report, run_attacks, searched_in
from fastrobust.runtime import half, trial
from fastrobust.runtime.errors import ConfigError


@pytest.fixture(scope="module")
def model(finished_run):
    return fastrobust.load(finished_run)


@pytest.fixture(scope="module")
def data():
    return few_images()


@pytest.fixture(autouse=True)
def any_processor_has_bf16(monkeypatch):
    monkeypatch.setattr(half, "has_bf16", lambda: True)


class Mistaken(nn.Module):
    """The network, whose passes in bf16 give other logits: `wrong(logits)`. `passes`: which were in bf16."""

    def __init__(self, network: nn.Module, wrong):
        super().__init__()
        self.network, self.wrong, self.passes = network, wrong, []

    def forward(self, x):
        on = torch.is_autocast_enabled("cpu")
        self.passes.append(on)
        with half.passes(False):
            logits = self.network(x)
        return self.wrong(logits) if on else logits


def swapped(logits):
    """Every image is misclassified, and the gradient is as it was but for its sign."""
    return -logits


def settled(logits):
    """No image is misclassified: class by class, the logits of the largest are made larger."""
    return logits + 1000 * nn.functional.one_hot(settled.labels[: len(logits)], logits.shape[1])


def start(x):
    return torch.empty_like(x).uniform_(-EPSILON, EPSILON, generator=torch.Generator().manual_seed(3))


def test_what_bf16_takes_for_broken_counts_where_fp32_confirms_it(model, data):
    """A plain loop: the same points, each judged in fp32."""
    x, y, threat = to_unit(data.images), data.labels, Threat(EPSILON)
    network, delta = Mistaken(model, swapped), threat.clip(start(x), x)
    with evaluating(network):
        found = x.clone()
        with half.passes(True):
            survived = attack(network, x, y, delta, threat=threat, alpha=0.02, steps=6, found=found, bf16=True)
            points = [delta]
            for _ in range(6):
                delta = gradient.step(network, x, y, delta, threat, 0.02)[1]
                points.append(delta)
        broken = torch.stack([breaks(model, x, y, x + point, threat) for point in points])
    assert torch.equal(survived, ~broken.any(0)) and 5 < survived.sum() < 55
    first = torch.stack([x + point for point in points])[broken.int().argmax(0), torch.arange(len(x))]
    assert torch.equal(found, torch.where(survived[:, None, None, None], x, first))


def test_where_bf16_sees_nothing_the_last_points_are_still_judged_in_fp32(model, data):
    x, y, threat = to_unit(data.images), data.labels, Threat(EPSILON)
    settled.labels = y
    network, delta = Mistaken(model, settled), threat.clip(start(x), x)
    with evaluating(network), half.passes(True):
        survived = attack(network, x, y, delta, threat=threat, alpha=0.02, steps=0, bf16=True)
        assert torch.equal(survived, classified(model, (x + delta).clamp(0, 1), y)) and not survived.all()
    assert network.passes and not any(network.passes)


def test_a_search_in_bf16_finds_what_one_in_fp32_finds(model, data):
    """And it is one: every step's pass is in bf16, those that judge are not."""
    watched = Mistaken(model, lambda logits: logits.bfloat16().float())
    (fp32,) = run(model, data, ["pgd-20-2"])
    (bf16,) = run(watched, data, ["pgd-20-2"], precision="bf16")
    assert torch.equal(fp32.clean, bf16.clean) and 5 < bf16.broken.sum() < bf16.attacked.sum() - 5
    assert (fp32.broken != bf16.broken).sum() <= 1
    assert watched.passes.count(True) > watched.passes.count(False) > 4
    assert (fp32.facts["arithmetic"], bf16.facts["arithmetic"]) == ("fp32", "bf16")
    assert [report("pgd-20-2", [r])["arithmetic"] for r in (fp32, bf16)] == ["fp32", "bf16"]


def test_the_adversarial_images_of_a_search_in_bf16_break_the_model_in_fp32(model, data):
    settings = {"epsilon": EPSILON, "attack": "pgd-10-2", "precision": "bf16"}
    found = fastrobust.adversarial_images(model, data.images, data.labels, **settings)
    x = to_unit(data.images)
    changed = (found != x).flatten(1).any(1)
    assert changed.sum() > 5 and not (classified(model, found, data.labels) & changed).any()
    assert (found - x).abs().max() <= EPSILON + 1e-7 and found.min() >= 0 and found.max() <= 1
    told = fastrobust.evaluate(model, data.images, data.labels, **settings)
    assert torch.equal(told.clean & ~told.robust, changed) and told.attacks[0]["arithmetic"] == "bf16"


def test_results_of_both_searches_have_files_of_their_own(model, data, tmp_path, monkeypatch):
    (bf16,) = run(model, data, ["pgd-3-1"], folder=tmp_path, precision="bf16")
    (fp32,) = run(model, data, ["pgd-3-1"], folder=tmp_path)
    assert bf16.path(tmp_path) != fp32.path(tmp_path) and len(list(tmp_path.iterdir())) == 2
    assert "arithmetic" not in fp32.settings and bf16.settings["arithmetic"] == "bf16"
    monkeypatch.setattr(accuracy, "run_rounds", lambda *a, **k: pytest.fail("attacked again"))
    assert run(model, data, ["pgd-3-1"], folder=tmp_path)[0].facts == fp32.facts
    # what a search in fp32 found is there: it counts
    assert run(model, data, ["pgd-3-1"], folder=tmp_path, precision="bf16")[0].facts == fp32.facts
    fp32.path(tmp_path).unlink()
    assert run(model, data, ["pgd-3-1"], folder=tmp_path, precision="bf16")[0].facts == bf16.facts
    with pytest.raises(pytest.fail.Exception):  # nor is what bf16 found taken for it
        run(model, data, ["pgd-3-1"], folder=tmp_path)


def test_an_interrupted_search_in_bf16_goes_on_in_bf16(model, data, tmp_path, monkeypatch):
    (whole,) = run(model, data, ["pgd-5-2"], precision="bf16")
    rounds, batches = accuracy.run_rounds, []

    def interrupted(*arguments, after, **options):
        def stop(*facts):
            after(*facts)
            batches.append(1)
            if len(batches) == 3:
                raise KeyboardInterrupt

        rounds(*arguments, after=stop, **options)

    monkeypatch.setattr(accuracy, "run_rounds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, data, ["pgd-5-2"], folder=tmp_path, precision="bf16")
    monkeypatch.setattr(accuracy, "run_rounds", rounds)
    (rest,) = run(model, data, ["pgd-5-2"], folder=tmp_path, precision="bf16")
    assert torch.equal(rest.broken, whole.broken) and rest.settings == whole.settings


def test_other_attacks_search_in_fp32(model, data, monkeypatch):
    make_cheap(monkeypatch)
    watched = Mistaken(model, swapped)
    names = ["pgd-t-1-1", "apgd-ce", "square"]
    records = run(watched, data, names, precision="bf16")
    assert not any(watched.passes) and {r.facts["arithmetic"] for r in records} == {"fp32"}
    assert report("all", [*run(watched, data, ["pgd-1-1"], precision="bf16"), *records])["arithmetic"] == "bf16"


@pytest.mark.parametrize("ratio, found", [(1.2, "bf16"), (1.1, "fp32"), (None, "fp32")])
def test_auto_is_what_a_trial_of_an_attacks_passes_finds(model, data, monkeypatch, ratio, found):
    tried = []

    def speed(model, x, passes, usual, other):
        assert (usual, other) == (half.FP32, half.BF16)
        tried.append((model.training, x.shape, any(p.requires_grad for p in model.parameters())))
        passes(x)
        return ratio

    monkeypatch.setattr(trial, "speed", speed)
    assert searched_in("auto", model, data.images) == found
    assert tried == [(False, (16, *data.images.shape[1:]), False)]
    assert searched_in("bf16", model, data.images) == "bf16" and searched_in("fp32", model, data.images) == "fp32"
    monkeypatch.setattr(half, "has_bf16", lambda: False)
    assert searched_in("bf16", model, data.images) == searched_in("auto", model, data.images) == "fp32"
    assert len(tried) == 1


def test_the_command_says_which_search_it_was(finished_run, tmp_path, capsys):
    file = str(finished_run / "model.safetensors")
    for precision in ("bf16", "fp32"):
        asked = ["evaluate", file, "--attack", "pgd-2-1", "--limit", "20", "--precision", precision, "--json"]
        assert cli(asked) == 0
        out = capsys.readouterr().out
        assert ("its steps in bf16" in out) is (precision == "bf16")
        result = json.loads(out[out.index("\n{") :])
        assert result["arithmetic"] == result["attacks"][0]["arithmetic"] == precision


def test_a_precision_that_is_none_is_refused(model, data):
    with pytest.raises(ConfigError, match="precision must be 'auto', 'fp32' or 'bf16'; it is 'half'"):
        fastrobust.evaluate(model, data.images, data.labels, epsilon=0.1, precision="half")
    with pytest.raises(SystemExit):
        cli(["evaluate", "run", "--precision", "fp16"])


def test_what_a_run_chose_is_what_its_evaluation_uses(model, data, monkeypatch):
    """`run_attacks` asks once for all attacks."""
    asked = []
    monkeypatch.setattr(accuracy, "searched_in", lambda precision, *rest: asked.append(precision) or "bf16")
    settings = {"epsilon": EPSILON, "alpha": 0.02, "batch_size": 16, "precision": "auto"}
    records = run_attacks(model, data, ["pgd-1-1", "pgd-2-1"], **settings)
    assert asked == ["auto"] and [r.facts["arithmetic"] for r in records] == ["bf16", "bf16"]
