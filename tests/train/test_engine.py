"""Engines run the same step: on static buffers and compiled it gives what it gives eagerly, for every method."""

import shutil

import pytest
import torch
from torch._inductor import config as inductor
from training_runs import NEWER, STEP_METHODS, STEP_OPTIONS, few_stages, on_noise, run_steps, same

from fastrobust.attack.pgd import StaticAttack, attack
from fastrobust.attack.threat import Threat
from fastrobust.attack.verdicts import evaluating
from fastrobust.data.batch import Batch
from fastrobust.runtime.errors import ConfigError
from fastrobust.train import engine

CASES = [(method, precision) for method in STEP_METHODS for precision in ("fp32", "bf16", "fp16") if method not in NEWER]


@pytest.mark.parametrize(("method", "precision"), [*CASES, *((method, "bf16") for method in NEWER)])
def test_static_buffers_change_nothing(method, precision):
    """More steps than the images make whole batches for (50 images, batches of 16), along the learning-rate schedule: bit
    for bit."""
    count = 4 if method in NEWER else 8
    plain = run_steps(on_noise(method, precision, network=few_stages(method)), count)
    noise = on_noise(method, precision, network=few_stages(method))
    static = run_steps(noise, count, lambda step, batch: engine.StaticStep(step.take, batch))
    assert plain.rates == static.rates and len(set(plain.rates)) > 1, "the learning rate must move on"
    assert plain.losses == static.losses
    assert same(plain.tensors, static.tensors)
    assert same(plain.state, static.state)
    kept = {"delta"} if method in ("fgsm-previous", "free") else set()
    assert plain.state.keys() == kept or method in NEWER


def test_random_numbers_move_on_with_the_steps():
    """The same batch twice through the static step: other crops and starts, so another loss."""
    noise = on_noise()
    learner, batch = noise.step.learner, next(noise.batches(1))
    learner.lr_table.zero_()  # the weights stay
    learner.batchnorm_in_attack = "eval"
    step = engine.StaticStep(noise.step.take, batch)
    losses = []
    for _ in range(3):
        learner.reset_sums()
        step(batch)
        losses.append(learner.read_sums()[0])
    assert len(set(losses)) == 3


def test_static_step_copies_its_batch():
    seen = []

    def batch(value: float) -> Batch:
        return Batch(torch.full((2, 3), value), torch.full((2,), value), torch.full((2,), value))

    step = engine.StaticStep(lambda given: seen.append((given.images.data_ptr(), *(t.clone() for t in given))), batch(0))
    given = batch(1), batch(2)
    for one in given:
        step(one)
    assert seen[0][0] == seen[1][0] not in [one.images.data_ptr() for one in given]
    for one, (_, *copied) in zip(given, seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, copied, strict=True))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
@inductor.patch(fallback_random=True)
def test_compiled_equals_eager():
    """FGSM with a warm-up of epsilon, 4 steps, the same random numbers: losses within 1 %, and the schedule exactly."""
    torch._dynamo.reset()
    plain = run_steps(on_noise(warmup=10, side=28), 4)
    compiled = run_steps(
        on_noise(warmup=10, side=28), 4, lambda step, batch: engine.prepare("compile", step.take, batch, step)
    )
    assert compiled.rates == plain.rates
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-2)
    assert compiled.tensors["sums.seen"] == plain.tensors["sums.seen"] == 64


def test_choose():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert engine.choose("auto", cpu) == "eager"
    assert engine.choose("auto", cuda) == "cuda_graph"
    assert engine.choose("compile", cpu) == "compile"
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        engine.choose("compile+cuda_graph", cpu)
    for name in ("winograd", "numba"):
        with pytest.raises(ConfigError, match=f"{name} is for a CPU"):
            engine.choose(name, cuda)


@pytest.mark.parametrize(
    ("begun", "on_a_cpu"),
    [
        ("cuda_graph", "eager"),
        ("compile+cuda_graph", "compile"),
        ("compile", "compile"),
        ("eager", "eager"),
        ("fused+cuda_graph", "fused"),
        ("winograd", "winograd"),
        ("numba", "numba"),
    ],
)
def test_a_run_that_was_begun_on_a_gpu_has_an_engine_on_a_cpu(begun, on_a_cpu, monkeypatch):
    monkeypatch.setattr(engine, "trouble_with_numba", lambda: None)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert engine.available(begun, cpu) == on_a_cpu
    assert engine.choose(engine.available(begun, cpu), cpu) == on_a_cpu
    assert engine.available(begun, cuda) == begun.replace("winograd", "eager").replace("numba", "eager")
    assert engine.choose(engine.available("auto", cpu), cpu) == "eager"
    monkeypatch.setattr(engine, "trouble_with_numba", lambda: "it is not installed")
    assert engine.available(begun, cpu) == on_a_cpu.replace("winograd", "eager").replace("numba", "eager")


def test_failed_capture_says_so_once_and_runs_eagerly(monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(engine, "GraphStep", fail)
    noise = on_noise()
    noise.step.engine = "cuda_graph"
    batch = next(noise.batches(1))
    noise.step(batch)
    noise.step(batch)
    message = capsys.readouterr().err
    assert message.count("warning") == 1 and "operation not permitted" in message and "eagerly" in message
    assert noise.step.learner.updates.item() == 2


def test_failed_compilation_says_so_once_and_trains_eagerly_from_the_same_state(monkeypatch, capsys, tmp_path):
    """A compiler that is not there: the first call fails within, after it has drawn random numbers."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    plain = run_steps(on_noise(), 3)
    capsys.readouterr()
    with inductor.patch({"cpp.cxx": (None, str(tmp_path / "no-such-compiler"))}):
        failed = run_steps(on_noise(), 3, lambda step, batch: engine.prepare("compile", step.take, batch, step))
    message = capsys.readouterr().err
    assert message.count("warning") == 1 and "could not be compiled, training eagerly" in message
    assert failed.rates == plain.rates and failed.losses == plain.losses
    assert same(failed.tensors, plain.tensors)


@pytest.fixture
def cheap_compiler(monkeypatch):
    """torch.compile without the compiler behind it: what is traced is run as it is. Gives the number of graphs so far."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled(function, backend="eager", **options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    names = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
    with torch._dynamo.config.patch({name: getattr(torch._dynamo.config, name) for name in names}):
        yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def compiled_step():
    noise = on_noise(side=28)
    noise.step.engine = "compile"
    return noise.step, next(noise.batches(1))


def test_the_ninth_compiled_step_is_compiled_too(cheap_compiler):
    """In one process, as in a benchmark of many rows; so is a later phase of a training. The compiler's own limit is 8."""
    for _ in range(9):
        step, batch = compiled_step()
        before = cheap_compiler()
        step(batch)
        assert cheap_compiler() > before
    for size in (15, 14):
        step.enter_phase(size, 3, 28)
        before = cheap_compiler()
        step(Batch(*(t[:size] for t in batch)))
        assert cheap_compiler() > before
    assert step.learner.updates.item() == 3


def test_options_are_compiled(cheap_compiler):
    options = STEP_OPTIONS["accumulate"] | STEP_OPTIONS["cutmix, cutout, alternate"]
    options["phases"] = [options["phases"][0] | {"resolution": 28}]
    plain = run_steps(on_noise(side=28, more=options), 2)
    noise = on_noise(side=28, more=options)
    compiled = run_steps(noise, 2, lambda step, batch: engine.prepare("compile", step.take, batch, step))
    assert cheap_compiler() > 2 and compiled.losses == pytest.approx(plain.losses, rel=1e-3)
    assert torch.equal(compiled.tensors["sums.updates"], plain.tensors["sums.updates"])


def test_a_step_is_never_eager_in_silence(cheap_compiler):
    """Beyond the compiler's limit its own way is to go on eagerly."""
    step, batch = compiled_step()
    step(batch)
    torch._dynamo.config.recompile_limit = 1
    with pytest.raises(Exception, match="recompile_limit"):
        step(Batch(*(t[:7] for t in batch)))


def test_a_compiler_that_is_switched_off_is_said(cheap_compiler, capsys):
    step, batch = compiled_step()
    with torch._dynamo.config.patch(disable=True):
        step(batch)
    message = capsys.readouterr().err
    assert message.count("warning") == 1 and "switched off" in message and "eagerly" in message


def test_static_attack_gives_the_same_verdicts():
    """Through the same start and steps, in a full batch and in one that is filled up."""
    noise = on_noise("standard")
    run_steps(noise, 20)
    model, n = noise.step.learner.model, 50
    x = noise.loader.images.permute(0, 3, 1, 2).float() / 255
    y = model.eval()(x).argmax(1)
    delta = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).mul(0.02).sub(0.01)
    delta = torch.minimum(torch.maximum(delta, -x), 1 - x)
    with evaluating(model):
        expected = attack(model, x, y, delta, threat=Threat(0.01), alpha=0.004, steps=7)
        static = StaticAttack(model, x, Threat(0.01), 0.004)
        assert torch.equal(static.attack(x, y, delta, 7), expected)
        assert torch.equal(static.attack(x[:11], y[:11], delta[:11], 7), expected[:11])
    assert 0 < expected.sum() < n, "the attack breaks some and not all: the comparison says something"
