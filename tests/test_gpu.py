"""What only a GPU can check: graphs equal eager steps, survive phases and resuming, and half precisions train."""

import subprocess
import sys

import pytest
import torch
from test_engine import METHODS, eager, make_job, run_steps

from fastrobust.attack.verdicts import classified
from fastrobust.data import sets
from fastrobust.evaluation.accuracy import evaluate
from fastrobust.models.weights import read_weights
from fastrobust.train import engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def graph(job, x, y):
    return engine.GraphStep(job.step.take, x, y, job)


@pytest.fixture(autouse=True)
def deterministic_convolutions():
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_graph_equals_eager(method, precision):
    """20 steps, odd batches included. The schedule is exact; losses agree to 2 %: kernels may be chosen differently."""
    plain = run_steps(make_job(method, precision, "cuda"), 20, eager)
    captured = run_steps(make_job(method, precision, "cuda"), 20, graph)
    assert captured[0] == plain[0]
    assert captured[1][0] == pytest.approx(plain[1][0], rel=1e-3), "the first replay is the first step"
    assert captured[1] == pytest.approx(plain[1], rel=2e-2)
    assert captured[2]["sums.updates"] == plain[2]["sums.updates"]


def test_capture_leaves_no_trace():
    job = make_job("free", "fp16", "cuda")
    before, generator = job.state_dict(), torch.cuda.get_rng_state()
    x, y = next(job.loader.batches(0, 0, 16, 0, 1))
    graph(job, x, y)
    after = job.state_dict()
    assert all(torch.equal(before["tensors"][name], after["tensors"][name]) for name in before["tensors"])
    assert torch.equal(before["delta"], after["delta"])
    assert torch.equal(generator, torch.cuda.get_rng_state())


def test_random_numbers_move_on_in_replays():
    job = make_job("fgsm", "fp32", "cuda")
    x, y = next(job.loader.batches(0, 0, 16, 0, 1))
    job.learner.lr_table.zero_()
    step = graph(job, x, y)
    losses = []
    for _ in range(3):
        job.learner.reset_sums()
        step(x, y)
        losses.append(job.learner.read_sums()[0])
    assert len(set(losses)) == 3


def test_graph_goes_on_from_a_restored_state():
    """A graph writes where the state lives: loading a state between replays is seen by the next one."""
    job = make_job("fgsm", "fp16", "cuda")
    batches = list(job.loader.batches(0, 0, 16, 0, 6))
    step = graph(job, *batches[0])
    for x, y in batches[:3]:
        step(x, y)
    state, generator = job.state_dict(), torch.cuda.get_rng_state()

    def rest():
        for x, y in batches[3:]:
            step(x, y)
        return job.state_dict()["tensors"]

    first = rest()
    job.load_state_dict(state)
    torch.cuda.set_rng_state(generator)
    second = rest()
    assert all(torch.equal(first[name], second[name]) for name in first if "num_batches" not in name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(precision):
    _, losses, tensors, _ = run_steps(make_job("fgsm", precision, "cuda"), 60, graph)
    assert losses[-1] - losses[-11] < losses[9]
    assert all(t.isfinite().all() for name, t in tensors.items() if t.is_floating_point())


def test_compiled_graph_trains():
    torch._dynamo.reset()
    plain = run_steps(make_job("fgsm", "bf16", "cuda"), 10, eager)
    compiled = run_steps(
        make_job("fgsm", "bf16", "cuda"),
        10,
        lambda job, x, y: engine.prepare("compile+cuda_graph", job.step.take, x, y, job),
    )
    assert compiled[0] == plain[0]
    assert compiled[1] == pytest.approx(plain[1], rel=0.1)


def test_steps_do_not_wait_for_the_host():
    job = make_job("fgsm", "fp16", "cuda")
    batches = list(job.loader.batches(0, 0, 16, 0, 4))
    job.step.take(*batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in batches[1:]:
            job.step.take(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_shares_gradients_over_nccl(tmp_path, config_file, few_bars):
    """One process, as torchrun starts it: the reduction is captured with the step, and the weights are those of a process
    without it (to what kernels chosen anew may differ)."""
    phases = [{"epochs": 2, "batch_size": 16, "resolution": 28}]
    changes = {"method": {"name": "fgsm", "init": "zero"}, "optimizer": {"name": "sgd"}, "device": "cuda", "phases": phases}
    file = config_file(tmp_path, data__path=str(few_bars), evaluation={"steps": 2, "restarts": 1}, **changes)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    for command, name in (([sys.executable], "alone"), (launch, "joined")):
        job = [*command, "-m", "fastrobust.train", str(file), f"name={name}", "engine=cuda_graph"]
        done = subprocess.run(job, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "no CUDA graph could be captured" not in done.stderr
    alone, joined = (read_weights(tmp_path / "runs" / n)[0].state_dict() for n in ("alone", "joined"))
    assert all(torch.allclose(alone[k], joined[k], rtol=0, atol=1e-3) for k in alone)


def test_evaluation_agrees_with_the_cpu():
    job = make_job("standard", "fp32", "cuda")
    run_steps(job, 20, eager)
    model, pixels = job.learner.model, job.loader.images.cpu().permute(0, 3, 1, 2)
    data = sets.ImageSet(pixels, job.loader.labels.cpu(), job.loader.classes, "made up")
    settings = {"epsilon": 2 / 255, "alpha": 1 / 255, "steps": 5, "restarts": 1, "batch_size": 32}
    on_gpu = evaluate(model, data, **settings)
    on_cpu = evaluate(model.cpu(), data, **settings)
    assert abs(on_gpu["clean_accuracy"] - on_cpu["clean_accuracy"]) <= 0.04
    assert abs(on_gpu["robust_accuracy"] - on_cpu["robust_accuracy"]) <= 0.1
    assert isinstance(classified(model, data.images, data.labels), torch.Tensor)
