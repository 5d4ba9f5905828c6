"""How a training step is run: eagerly, compiled, or captured whole as one CUDA graph; `fused` means kernels of our own
(`models/fused.py`, `shadow.py`), `numba` such kernels on a CPU (`models/norm_numba.py`), `winograd` those and convolutions
of our own (`models/winograd.py`). The step is the same function.

A step takes a batch and changes tensors in place; nothing else leaves it. So it can be run on static buffers,
recorded once on a CUDA stream, and replayed: learning rate, loss scale, random numbers and sums are device tensors that
move on inside the graph.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch

from fastrobust.data.batch import Batch
from fastrobust.models.fused import trouble, trouble_with_numba, unwritten
from fastrobust.runtime.cuda_graph import on_stream, record
from fastrobust.runtime.errors import ConfigError, first_line, is_out_of_memory

WARM_UP = 3  # eager steps before a capture: they settle cuDNN's choices and the allocator
WARM_UP_SHARED = 11  # and DistributedDataParallel's buckets
BY_NUMBA = ("numba", "winograd")  # engines of a CPU
Run = Callable[[Batch], None]


def choose(engine: str, device: torch.device) -> str:
    """What `auto` stands for: the graph on a GPU; on a CPU eager, which starts at once (compiling takes a minute)."""
    if engine == "auto":
        return "cuda_graph" if device.type == "cuda" else "eager"
    if "cuda_graph" in engine and device.type != "cuda":
        raise ConfigError(f"engine: {engine} needs a CUDA device, this is {device}; use auto, eager or compile")
    if engine in BY_NUMBA and device.type != "cpu":
        raise ConfigError(f"engine: {engine} is for a CPU, this is {device}; use auto")
    return engine


def available(engine: str, device: torch.device) -> str:
    """The engine of a run that is resumed on this device: a run begun on a GPU goes on without graphs on a CPU, and one with
    numba's kernels without them where numba is not."""
    if engine in BY_NUMBA and (device.type == "cuda" or trouble_with_numba()):
        return "eager"
    if device.type == "cuda":
        return engine
    return engine.replace("+cuda_graph", "").replace("cuda_graph", "eager")


def wants_kernels(engine: str, device: torch.device) -> bool:
    """Whether the engine asks for Triton's kernels; where there are none it is said, and torch's do the same work."""
    if "fused" in engine and (why := trouble(device)):
        print(f"warning: engine {engine} goes on without kernels of its own: {why}", file=sys.stderr)
    return "fused" in engine


def set_deterministic(on: bool) -> None:
    """Whether torch may use kernels whose result depends on the order in which threads finish."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's libraries start
    if on != torch.are_deterministic_algorithms_enabled():  # the call below imports the compiler, which takes seconds
        torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not on  # shapes are fixed: the fastest convolutions are looked for once


def prepare(engine: str, run: Run, batch: Batch, owner) -> Run:
    """`run`, which takes one training step, as the engine runs it. `batch` is an example of its batches, which must all have
    one shape. `owner` gives `state_dict()` and `load_state_dict(state)` for everything a step changes, and the `learner`
    whose forward pass is compiled. What the engine cannot do is said once, and steps are run eagerly."""
    if "compile" in engine:
        run = CompiledStep(run, owner)
    if "cuda_graph" in engine:
        try:
            return GraphStep(run, batch, owner)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            print(f"warning: no CUDA graph could be captured, training eagerly: {first_line(error)}", file=sys.stderr)
    return beside_ddp(run, batch.images.device) if batch.images.is_cuda and owner.learner.shared is not None else run


def beside_ddp(run: Run, device: torch.device) -> Run:
    """The step on the stream on which DistributedDataParallel was built: else every update waits between two streams."""

    def step(batch: Batch) -> None:
        with on_stream(device):
            run(batch)

    return step


class CompiledStep:
    """The forward pass is compiled with its backward pass, once for attacks and once for updates, and the elementwise
    work around them (crop, start, sign, clamps) becomes a few fused kernels. Gradients and the optimiser stay outside.
    Compilation happens in the first call: if it fails there (no C++ compiler, say), what that call changed is put
    back, it is said, and steps are run eagerly from then on."""

    def __init__(self, run: Run, owner):
        self.eager, self.owner, self.tried = run, owner, False
        learner, limits = owner.learner, torch._dynamo.config
        limits.recompile_limit = limits.accumulated_recompile_limit = 4096  # else the ninth step runs eagerly, silently
        limits.fail_on_recompile_limit_hit = True
        if "forward" not in vars(learner):  # another phase has compiled it
            learner.forward = torch.compile(learner.forward, dynamic=False)
            for name in OUTSIDE:
                setattr(learner, name, torch.compiler.disable(getattr(learner, name)))
        self.run = torch.compile(run, dynamic=False)

    def __call__(self, batch: Batch) -> None:
        if self.tried:
            return self.run(batch)
        self.tried = True
        put_back = keep_state(self.owner, batch.images.device)
        try:
            self.run(batch)
            if not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
                raise RuntimeError("the compiler is switched off (TORCHDYNAMO_DISABLE or TORCH_COMPILE_DISABLE)")
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            put_back()
            print(f"warning: the step could not be compiled, training eagerly: {first_line(error)}", file=sys.stderr)
            for name in ("forward", *OUTSIDE):
                vars(self.owner.learner).pop(name, None)
            self.run = self.eager
            self.run(batch)


OUTSIDE = (  # of what the compiler sees
    *("input_gradient", "attack_gradient", "attack_logits", "update", "update_with_input_gradient"),
    *("mean", "gather", "now", "epoch"),
)


def keep_state(owner, device: torch.device) -> Callable[[], None]:
    """A function that puts back all that steps change from here on, the random generators included."""
    before, cpu = owner.state_dict(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def put_back() -> None:
        owner.load_state_dict(before)
        owner.learner.optimizer.zero_grad(set_to_none=True)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)

    return put_back


class StaticStep:
    """The step on buffers of its own: a batch is copied in, then the step runs on them."""

    def __init__(self, run: Run, batch: Batch):
        self.eager, self.batch = run, Batch(*(t.clone() for t in batch))

    def __call__(self, batch: Batch) -> None:
        for mine, given in zip(self.batch, batch, strict=True):
            mine.copy_(given)
        self.run()

    def run(self) -> None:
        self.eager(self.batch)


class GraphStep(StaticStep):
    """The step recorded as a CUDA graph; where there is an alignment to note, as two, with it and without. Recording trains
    a little; all that changed is put back, the random generator included: the first replay is the first step. Raises
    RuntimeError where it cannot be captured."""

    def __init__(self, run: Run, batch: Batch, owner):
        super().__init__(run, batch)
        self.learner = learner = owner.learner
        put_back, device = keep_state(owner, batch.images.device), batch.images.device
        warm_up = WARM_UP if learner.shared is None else WARM_UP_SHARED
        self.graphs, self.updates = {}, 0
        try:
            for looks in (True, False) if len(learner.alignments) else (False,):
                if looks or learner.aligned or not self.graphs:
                    learner.looks = looks
                    self.graphs[looks] = record(self._once, device, put_back, warm_up)
            self.counted = unwritten(learner.model)  # in a capture alone: `put_back` came before it
        finally:
            learner.looks = None
            put_back()

    def __call__(self, batch: Batch) -> None:
        super().__call__(batch)
        for counter, batches in self.counted:  # a replay runs no Python
            counter[0] += batches

    def _once(self) -> None:
        before = self.learner.made
        self.eager(self.batch)
        self.updates = self.learner.made - before

    def run(self) -> None:
        self.graphs[self.learner.due() or False not in self.graphs]()
        self.learner.made += self.updates
