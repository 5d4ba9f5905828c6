"""Engines run the same step: on static buffers and compiled it gives what it gives eagerly, for every method."""

import shutil
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor

from fastrobust.attack.pgd import StaticAttack, attack
from fastrobust.attack.verdicts import evaluating
from fastrobust.config import reading
from fastrobust.data.sets import ImageSet
from fastrobust.runtime.errors import ConfigError
from fastrobust.train import engine
from fastrobust.train.training import Training

METHODS = {
    "standard": {"name": "standard"},
    "fgsm": {"name": "fgsm"},
    "fgsm-previous": {"name": "fgsm", "init": "previous"},
    "fgsm-ibp": {"name": "fgsm", "ibp_weight": 0.3},
    "n_fgsm": {"name": "n_fgsm"},
    "pgd": {"name": "pgd", "steps": 2, "alpha": "2/255", "skip_misclassified": True},
    "free": {"name": "free", "replays": 2},
}


SIDE = 8  # pixels: small images, all of the network


def make_job(method="fgsm", precision="fp32", device="cpu", engine_name="eager", warmup=0, side=SIDE):
    side = 28 if method == "fgsm-ibp" else side
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, side, side, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    labels = torch.randint(0, 10, (50,), generator=generator)
    settings = {
        "name": "engine",
        "device": device,
        "engine": engine_name,
        "precision": precision,
        "epsilon": "8/255",
        "epsilon_warmup": warmup,
        "data": {"dataset": "image_folder", "augment": {"crop": "pad", "padding": 2, "flip": True}},
        "model": {"name": "mnist_net" if side == 28 else "preact_resnet18_w16"},
        "method": METHODS[method],
        "optimizer": {"name": "sgd"},
        "schedule": {"name": "cyclic", "max_lr": 0.05},
        "phases": [{"epochs": 20, "batch_size": 16, "resolution": side}],
    }
    data = ImageSet(pixels, labels, tuple("0123456789"), "made up")
    return Training(reading.parse(settings, "test"), Path("unused"), torch.device(device), data)


def run_steps(job, steps, prepare):
    """The learning rates, losses and final tensors of some steps from one seed."""
    torch.manual_seed(3)
    step, rates, losses = None, [], []
    for x, y in job.loader.batches(0, 0, 16, 0, steps):
        step = step or prepare(job, x, y)
        step(x, y)
        rates.append(job.learner.lr.item())
        losses.append(job.learner.read_sums()[0])
    return rates, losses, {name: t.clone() for name, t in job.learner.tensors().items()}, job.delta.clone()


def eager(job, x, y):
    return job.step.take


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_static_buffers_change_nothing(method, precision):
    """20 steps, over an odd batch count (50 images, batches of 16) and the learning-rate schedule: bit for bit."""
    steps = 20
    plain = run_steps(make_job(method, precision), steps, eager)
    static = run_steps(make_job(method, precision), steps, lambda job, x, y: engine.StaticStep(job.step.take, x, y))
    assert plain[0] == static[0] and len(set(plain[0])) > 1, "the learning rate must move on"
    assert plain[1] == static[1]
    assert all(torch.equal(plain[2][name], static[2][name]) for name in plain[2])
    assert torch.equal(plain[3], static[3])


def test_random_numbers_move_on_with_the_steps():
    """The same batch twice through the static step: other crops and starts, so another loss."""
    job = make_job()
    x, y = next(job.loader.batches(0, 0, 16, 0, 1))
    job.learner.lr_table.zero_()  # the weights stay
    job.learner.attack_batchnorm = "eval"
    step = engine.StaticStep(job.step.take, x, y)
    losses = []
    for _ in range(3):
        job.learner.reset_sums()
        step(x, y)
        losses.append(job.learner.read_sums()[0])
    assert len(set(losses)) == 3


def test_static_step_copies_its_batch():
    seen = []
    step = engine.StaticStep(
        lambda x, y: seen.append((x.data_ptr(), x.clone(), y.clone())), torch.zeros(2, 3), torch.zeros(2)
    )
    a, b = torch.ones(2, 3), torch.full((2, 3), 2.0)
    step(a, torch.ones(2))
    step(b, torch.ones(2) * 2)
    assert seen[0][0] == seen[1][0] not in (a.data_ptr(), b.data_ptr())
    assert torch.equal(seen[0][1], a) and torch.equal(seen[1][1], b) and torch.equal(seen[1][2], torch.ones(2) * 2)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
@inductor.patch(fallback_random=True)
def test_compiled_equals_eager():
    """FGSM with a warm-up of epsilon, 4 steps, the same random numbers: losses within 1 %, and the schedule exactly."""
    torch._dynamo.reset()
    plain = run_steps(make_job(warmup=10, side=28), 4, eager)
    compiled = run_steps(
        make_job(warmup=10, side=28), 4, lambda job, x, y: engine.prepare("compile", job.step.take, x, y, job)
    )
    assert compiled[0] == plain[0]
    assert compiled[1] == pytest.approx(plain[1], rel=1e-2)
    assert compiled[2]["sums.seen"] == plain[2]["sums.seen"] == 64


def test_choose():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert engine.choose("auto", cpu) == "eager"
    assert engine.choose("auto", cuda) == "cuda_graph"
    assert engine.choose("compile", cpu) == "compile"
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        engine.choose("compile+cuda_graph", cpu)


def test_failed_capture_says_so_once_and_runs_eagerly(monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(engine, "GraphStep", fail)
    job = make_job()
    x, y = next(job.loader.batches(0, 0, 16, 0, 1))
    step = engine.prepare("cuda_graph", job.step.take, x, y, job)
    step(x, y)
    step(x, y)
    message = capsys.readouterr().err
    assert message.count("warning") == 1 and "operation not permitted" in message and "eagerly" in message
    assert job.learner.updates.item() == 2


def test_failed_compilation_says_so_once_and_trains_eagerly_from_the_same_state(monkeypatch, capsys, tmp_path):
    """A compiler that is not there: the first call fails within, after it has drawn random numbers."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    plain = run_steps(make_job(), 3, eager)
    capsys.readouterr()
    with inductor.patch({"cpp.cxx": (None, str(tmp_path / "no-such-compiler"))}):
        failed = run_steps(make_job(), 3, lambda job, x, y: engine.prepare("compile", job.step.take, x, y, job))
    message = capsys.readouterr().err
    assert message.count("warning") == 1 and "could not be compiled, training eagerly" in message
    assert failed[:2] == plain[:2]
    assert all(torch.equal(a, b) for a, b in zip(failed[2].values(), plain[2].values(), strict=True))


def test_static_attack_gives_the_same_verdicts():
    """Through the same start and steps, in a full batch and in one that is filled up."""
    job = make_job("standard")
    run_steps(job, 20, eager)
    model, n = job.learner.model, 50
    x = job.loader.images.permute(0, 3, 1, 2).float() / 255
    y = job.learner.model.eval()(x).argmax(1)
    delta = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).mul(0.02).sub(0.01)
    delta = torch.minimum(torch.maximum(delta, -x), 1 - x)
    with evaluating(model):
        expected = attack(model, x, y, delta, epsilon=0.01, alpha=0.004, steps=7)
        static = StaticAttack(model, x, 0.01, 0.004)
        assert torch.equal(static.attack(x, y, delta, 7), expected)
        assert torch.equal(static.attack(x[:11], y[:11], delta[:11], 7), expected[:11])
    assert 0 < expected.sum() < n, "the attack breaks some and not all: the comparison says something"
