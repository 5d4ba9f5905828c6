"""Captures on the simulated GPU: what CUDA forbids in them, and what a graph may hold. Numbers are all zero there, so that
nothing here depends on one; what does is in tests/test_gpu.py. `make gpu-sim` runs this, elsewhere it skips."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
from training_runs import STEP_METHODS, STEP_OPTIONS, on_noise

from benchmarks.step import cifar_config, images
from fastrobust.attack.base import Setting
from fastrobust.attack.pgd import Pgd
from fastrobust.attack.pgd_targeted import PgdT
from fastrobust.attack.threat import Threat
from fastrobust.attack.verdicts import breaks, evaluating
from fastrobust.config import reading
from fastrobust.data.augment import to_unit
from fastrobust.data.loaders.resident import Resident
from fastrobust.data.sets import ImageSet
from fastrobust.models import fused
from fastrobust.models.weights import build_model
from fastrobust.runtime import cuda_graph, distributed
from fastrobust.runtime.cuda_graph import on_stream, record
from fastrobust.runtime.interrupt import Stop
from fastrobust.train import engine, guard
from fastrobust.train.learner import Learner
from fastrobust.train.step import build
from fastrobust.train.training import Training
from tests.gpusim import sim

pytestmark = pytest.mark.skipif(not sim.HERE, reason="needs the simulated GPU: make gpu-sim")
FGSM_NODES = {"cuda_graph": 421, "fused+cuda_graph": 285}  # of the paper's network, batch 128, fp16. May only be lowered
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def allowed():
    """No test may make a call that CUDA forbids, unless it says so."""
    gc.collect()
    sim.reset()
    yield
    assert sim.errors() == []


def captured(step, batch) -> list[str]:
    """The nodes of the step's graph, which is replayed twice."""
    step.engine = step.engine if "cuda_graph" in step.engine else "cuda_graph"
    step(batch)
    assert isinstance(step._run, engine.GraphStep), "no graph was captured"
    step(batch)
    return sim.graph()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", STEP_METHODS)
def test_every_method_is_captured_twice(method, precision):
    """In one process, as two phases, two runs of a sweep or two rows of a benchmark are."""
    nodes = []
    for _ in range(2):
        noise = on_noise(method, precision, "cuda")
        nodes.append(captured(noise.step, next(noise.batches(1))))
        noise = None
    assert nodes[0] == nodes[1] and len(nodes[0]) > 50


def test_the_pool_outlives_its_graphs():
    """A pool that is only named dies with its last graph, in torch 2.11; where a tensor of it is left, the next capture
    fails."""
    left = []

    def run() -> None:
        left[:] = [torch.rand(1000, device="cuda")] if torch.cuda.is_current_stream_capturing() else left

    for _ in range(2):
        record(run, CUDA)()
        gc.collect()


def test_our_kernels_fit_into_the_registers_of_an_h100():
    """Compiled for sm_90 by Triton and NVIDIA's assembler; a stack is where registers that did not fit are kept. Triton
    3.8 keeps two of one kernel's there."""
    triton = pytest.importorskip("triton")
    from benchmarks import counts

    found = counts.compiled()
    allowed = 0 if tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 6) else 8
    assert len(found) == 14 and all(row["stack"] <= allowed and row["registers"] <= 128 for row in found), found


@pytest.mark.parametrize("option", STEP_OPTIONS)
def test_every_option_is_captured(option):
    noise = on_noise("fgsm", "fp16", "cuda", more=STEP_OPTIONS[option])
    assert len(captured(noise.step, next(noise.batches(1)))) > 50


@pytest.mark.parametrize("name", FGSM_NODES)
def test_the_graph_of_fgsm_is_small(name):
    config, loader = cifar_config("fgsm", name, "fp16", 128), Resident(images(512), CUDA)
    nodes, ceiling = captured(build(config, loader, CUDA), next(loader.batches(0, 0, 128, 0, 1))), FGSM_NODES[name]
    assert len(nodes) <= ceiling, f"the graph of an FGSM step has grown to {len(nodes)} nodes"
    assert len(nodes) > ceiling - 20, f"well done: lower the ceiling to {len(nodes)} nodes"


def test_a_replay_is_a_few_copies_and_one_launch():
    """Per step, the loader included: nothing is allocated or waited for."""
    noise = on_noise("fgsm", "fp16", "cuda")
    captured(noise.step, next(noise.batches(1)))
    for batch in noise.batches(3):
        noise.step(batch)
    sim.reset()
    for batch in noise.batches(3):
        noise.step(batch)
    counts = sim.counts()
    assert counts["graph"] == 3
    assert not [name for name in counts if "Synchronize" in name or "Malloc" in name or "HostAlloc" in name], counts
    assert sum(n for name, n in counts.items() if name.startswith("kernel")) <= 10 * 3, counts


def test_a_step_that_cannot_be_captured_goes_on_eagerly(capsys):
    noise = on_noise("fgsm", "fp16", "cuda")
    step, (batch, other) = noise.step, noise.batches(2)
    step.engine, take = "cuda_graph", step.take

    def waits(batch):
        take(batch)
        step.learner.correct.item()

    step.take = waits
    step(batch)
    step(other)
    said = capsys.readouterr().err
    assert not isinstance(step._run, engine.GraphStep) and said.count("warning") == 1 and "not permitted" in said
    assert any("cudaStreamSynchronize" in error for error in sim.errors())
    sim.reset()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.rand(3, device="cuda")  # the generator does not wait for a replay
    torch.cuda.empty_cache()
    later = on_noise("fgsm", "fp16", "cuda")
    captured(later.step, batch)


def test_the_second_device():
    second, where = torch.device("cuda:1"), []
    record(lambda: where.append((torch.cuda.current_device(), torch.cuda.current_stream().device.index)), second, warm_up=1)
    with on_stream(second):
        where.append((torch.cuda.current_device(), torch.cuda.current_stream().device.index))
    assert where == [(1, 1)] * 3
    noise = on_noise("fgsm", "fp16", "cuda:1")
    captured(noise.step, next(noise.batches(1)))
    assert torch.cuda.current_device() == 0
    captured(on_noise("fgsm", "fp16", "cuda:0").step, next(on_noise("fgsm", "fp16", "cuda:0").batches(1)))


@pytest.mark.parametrize("name", ["fused", "fused+cuda_graph"])
def test_kernels_run_on_the_device_of_their_tensors(name, monkeypatch):
    """Triton launches on the current device, whatever the tensors' is: on a real GPU an illegal address."""
    JITFunction = pytest.importorskip("triton.runtime.jit").JITFunction
    launch, wrong, right = JITFunction.run, [], []

    def watched(self, *arguments, **options):
        where = next(t.device.index for t in arguments if isinstance(t, torch.Tensor))
        (right if where == torch.cuda.current_device() else wrong).append(self.__name__)
        return launch(self, *arguments, **options)

    fused._tried.cache_clear()
    monkeypatch.setattr(JITFunction, "run", watched)
    noise = on_noise("fgsm", "fp16", "cuda:1", engine=name)
    noise.step(next(noise.batches(1)))
    assert len(set(right)) == 9 and not wrong, sorted(set(wrong))


def config_of(model: str, side: int, **more):
    settings = {
        "name": "simulated",
        "device": "cuda",
        "engine": "cuda_graph",
        "loader": "resident",
        "precision": "bf16",
        "epsilon": "8/255",
        "data": {"dataset": "image_folder", "augment": {"crop": "pad", "padding": 2, "flip": True}},
        "model": {"name": model},
        "method": {"name": "fgsm"},
        "optimizer": {"name": "sgd"},
        "schedule": {"name": "cyclic", "max_lr": 0.05},
        "phases": [{"epochs": 1, "batch_size": 16, "resolution": side}],
    }
    return reading.parse(settings | more, "test")


def image_set(side: int) -> ImageSet:
    pixels = torch.zeros(50, side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    return ImageSet(pixels, torch.arange(50) % 10, tuple("0123456789"), "made up")


@pytest.mark.parametrize(("model", "side"), [("resnet50", 64), ("convnext_tiny", 64), ("vit_b_16", 224)])
def test_models_of_torchvision(model, side):
    loader = Resident(image_set(side), CUDA)
    step = build(config_of(model, side), loader, CUDA)
    assert len(captured(step, next(loader.batches(0, 0, 16, 0, 1)))) > 500


def test_two_phases_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "trouble", lambda learner: None)  # it asks for numbers
    monkeypatch.setattr(Learner, "read_sums", lambda self: (1.0, 10, 50))
    monkeypatch.setattr("fastrobust.data.loaders.Phases.enter", lambda self, index: Resident(image_set(16), CUDA))
    monkeypatch.setattr("fastrobust.data.loaders.Phases.check_files", lambda self, count: None)
    phases = [{"epochs": 2, "batch_size": size, "resolution": 16} for size in (25, 10)]
    training = Training(config_of("preact_resnet18_w16", 16, phases=phases, guard={"action": "off"}), tmp_path, CUDA)
    training.train()
    assert isinstance(training.step._run, engine.GraphStep) and len(training.step._run.batch.images) == 10
    assert sim.counts()["graph"] == 2 * 2 + 2 * 5


def test_a_recovery_records_another_graph(tmp_path, monkeypatch):
    """The graph of the method that overfitted is let go, and the state is put back without a forbidden call."""
    judged = iter([None, ("overfit", "made up"), None])
    monkeypatch.setattr(guard, "trouble", lambda learner: None)  # it asks for numbers
    monkeypatch.setattr(guard, "verdict", lambda *given: next(judged))
    monkeypatch.setattr(Learner, "read_sums", lambda self: (1.0, 10, 50))
    monkeypatch.setattr("fastrobust.data.loaders.Phases.enter", lambda self, index: Resident(image_set(16), CUDA))
    monkeypatch.setattr("fastrobust.data.loaders.Phases.check_files", lambda self, count: None)
    phases = [{"epochs": 3, "batch_size": 25, "resolution": 16}]
    training = Training(config_of("preact_resnet18_w16", 16, phases=phases, guard={"action": "recover"}), tmp_path, CUDA)
    prepared, prepare = [], engine.prepare
    monkeypatch.setattr(engine, "prepare", lambda *a: prepared.append(prepare(*a)) or prepared[-1])
    training.train()
    assert [type(run) for run in prepared] == [engine.GraphStep] * 2 and training.step.method.name == "n_fgsm"
    assert training.history[1]["went_back_to"] == 1


@pytest.fixture
def torchrun(monkeypatch):
    """One process, as torchrun starts it."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "common_store", lambda world: torch.distributed.HashStore())


def shared_and_captured(method: str) -> list[str]:
    noise = on_noise(method, "fp16", "cuda")
    noise.step.learner.share_gradients()
    return captured(noise.step, next(noise.batches(1)))


@pytest.mark.parametrize("method", ["fgsm", "free"])
def test_gradients_are_shared_within_the_graph(method, monkeypatch, torchrun):
    """`free` with 9 replays is at pass 100 when it is captured."""
    monkeypatch.setitem(STEP_METHODS, "free", {"name": "free", "replays": 9})
    with distributed.joined("cuda"):
        assert shared_and_captured(method).count("ncclAllReduce") >= (9 if method == "free" else 1)


@pytest.mark.parametrize("name", ["eager", "cuda_graph"])
def test_gradients_are_accumulated_on_the_stream_of_the_steps(name, torchrun, recwarn):
    """DistributedDataParallel accumulates on the stream on which it was built. torch warns where gradients come from
    another, and then waits between the two at every weight."""
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with distributed.joined("cuda"):
            noise = on_noise("fgsm", "fp16", "cuda", engine=name)
            noise.step.learner.share_gradients()
            for batch in noise.batches(2):
                noise.step(batch)
            assert isinstance(noise.step._run, engine.GraphStep) == (name == "cuda_graph")
    finally:
        torch.set_warn_always(always)
    assert not [w for w in recwarn if "stream does not match" in str(w.message)]


@pytest.mark.parametrize("end", [None, KeyboardInterrupt, ZeroDivisionError, Stop(15)], ids=str)
def test_no_graph_outlives_the_processes_that_share_gradients(end, torchrun):
    """Else NCCL waits for ever at its end: also after Ctrl-C, an error and a signal. What holds the graph still lives."""
    kept = []
    with contextlib.suppress(KeyboardInterrupt, ZeroDivisionError, Stop), distributed.joined("cuda"):
        noise = on_noise("fgsm", "fp16", "cuda")
        kept.append(noise.step)
        noise.step.learner.share_gradients()
        captured(noise.step, next(noise.batches(1)))
        assert sim.graphs_with_nccl() == 2  # with the alignment of gradients and without
        if end is not None:
            raise end
    assert sim.graphs_with_nccl() == 0 and kept[0]._run is not None


@pytest.mark.parametrize("guarded", [True, False], ids=["as it is", "unguarded"])
def test_an_old_graph_that_is_garbage_is_not_freed_within_a_capture(guarded, monkeypatch):
    """Python frees what refers to itself when it has made some more objects: if within a capture, that ends it."""
    if not guarded:
        monkeypatch.setattr(cuda_graph, "_no_collection", contextlib.nullcontext)
    number, old = torch.zeros((), device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(old):
        number.add_(1)
    circle = [old]
    circle.append(circle)
    held = [circle]
    del old, circle

    def busy() -> None:
        held.clear()  # from here on the graph is garbage
        [[] for _ in range(50_000)]
        number.add_(1)

    with contextlib.nullcontext() if guarded else pytest.raises(RuntimeError):
        record(busy, CUDA, warm_up=0)
    assert gc.isenabled() and guarded == ("cudaGraphExecDestroy" not in "".join(sim.errors()))
    if not guarded:
        sim.reset()


def test_an_evaluation_at_two_radii(capsys):
    """Each attack is captured; its batches have one shape, and so has the last."""
    model = build_model(config_of("preact_resnet18_w16", 32), tuple("0123456789")).cuda().eval()
    data = images(70).images.cuda().contiguous(memory_format=torch.channels_last)
    for epsilon in (4 / 255, 8 / 255):
        attack = Pgd(Setting(model, data, Threat(epsilon), epsilon / 4, 40, 0), (50, 10))
        alive = torch.ones(70, dtype=torch.bool)
        with evaluating(model):
            list(attack.batches(0, alive))  # on the CPU: what is alive is known there
            assert attack.static.run.__name__ == "replay" and len(sim.graph()) > 50
            x, y = to_unit(data[:7]), torch.zeros(7, dtype=torch.int64, device="cuda")
            survived, found = attack.run(x, y, torch.zeros_like(x))
        assert len(survived) == len(found) == 7 and attack.batch_size == 35
    assert "no CUDA graph" not in capsys.readouterr().err


def test_no_kernels_are_tried_out_for_new_numbers_of_images(monkeypatch):
    """The last batch of an attack, and the successes that are checked again, are never so many twice. At every new number
    cuDNN would try out its kernels, and wait for each."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    model = build_model(config_of("preact_resnet18_w16", 32), tuple("0123456789")).cuda().eval()
    data = images(70).images.cuda().contiguous(memory_format=torch.channels_last)
    attack = Pgd(Setting(model, data, Threat(0.03), 0.01, 40, 0), (2, 1))
    attack.tried = True  # no graph for so few
    list(attack.batches(0, torch.ones(70, dtype=torch.bool)))
    waits = []
    with evaluating(model):
        for count in (20, 7, 33, 11):
            sim.reset()
            x, y = to_unit(data[:count]), torch.zeros(count, dtype=torch.int64, device="cuda")
            attack.run(x, y, torch.zeros_like(x))
            breaks(model, x, y, x, attack.threat, attack.batch_size)
            waits.append(sim.counts().get("cudaDeviceSynchronize", 0))
    assert waits[0] > 20 and waits[1:] == [0, 0, 0]


def test_other_attacks_have_kernels_tried_out_for_few_numbers_of_images(monkeypatch):
    """Of 40 images and less, ever fewer are left: 40, 20, 10, 5, 2 and 1 are all that cuDNN sees."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    model = build_model(config_of("preact_resnet18_w16", 32), tuple("0123456789")).cuda().eval()
    data = images(70).images.cuda().contiguous(memory_format=torch.channels_last)
    attack = PgdT(Setting(model, data, Threat(0.03), 0.01, 40, 0), (1, 1))
    waits = []
    with evaluating(model):
        for count in (37, 18, 9, 4, 2, 1, 33, 31, 22, 19, 11, 7, 3):
            sim.reset()
            x, y = to_unit(data[:count]), torch.zeros(count, dtype=torch.int64, device="cuda")
            attack.run(x, y, (torch.zeros_like(x), 0))
            waits.append(sim.counts().get("cudaDeviceSynchronize", 0))
    assert waits[0] > 20 and not any(waits[6:]), waits


def test_batches_are_counted_in_replays_without_a_kernel():
    noise = on_noise("fgsm", "fp16", "cuda")
    captured(noise.step, next(noise.batches(1)))  # two steps of two passes each
    counters = [counter for counter, _ in fused.unwritten(noise.step.learner.model)]
    assert len(counters) > 10 and all(counter == [4] for counter in counters)
    noise.step.state_dict()
    assert all(counter == [0] for counter in counters)


def test_the_simulation_forbids_what_cuda_forbids():
    """Else the tests above would say nothing."""
    number, event = torch.zeros((), device="cuda"), torch.cuda.Event()
    event.record()
    forbidden = {
        "cudaStreamSynchronize": lambda: number.item(),
        "cudaDeviceSynchronize": torch.cuda.synchronize,
        "cudaEventQuery": lambda: event.query(),
        "a wait for work from outside": lambda: torch.cuda.current_stream().wait_event(event),
        "Unjoined": lambda: torch.cuda.Stream().wait_stream(torch.cuda.current_stream()),
    }
    for what, call in forbidden.items():
        sim.reset()
        with pytest.raises(RuntimeError):
            record(call, CUDA, warm_up=0)
        assert what in "".join(sim.errors()), (what, sim.errors())
    sim.reset()
    pinned = torch.zeros(()).pin_memory()  # made outside: torch 2.11 cannot capture twice into a pool that pinned memory
    record(lambda: number.copy_(pinned, non_blocking=True), CUDA, warm_up=0)
    assert sim.errors() == ["a captured copy between host and device"]
    sim.reset()
