"""How a training step is run: eagerly, compiled, or captured whole as one CUDA graph. The step is the same function.

A step takes (images, labels) and changes tensors in place; nothing else leaves it. So it can be run on static buffers,
recorded once on a CUDA stream, and replayed: learning rate, loss scale, random numbers and sums are device tensors that
move on inside the graph.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from fastrobust.errors import ConfigError, first_line, is_out_of_memory

WARM_UP = 3  # eager steps before a capture: they settle cuDNN's choices and the allocator
WARM_UP_SHARED = 11  # and DistributedDataParallel's buckets
Step = Callable[[Tensor, Tensor], None]


def choose(engine: str, device: torch.device) -> str:
    """What `auto` stands for: the graph on a GPU; on a CPU eager, which starts at once (compiling takes a minute)."""
    if engine == "auto":
        return "cuda_graph" if device.type == "cuda" else "eager"
    if "cuda_graph" in engine and device.type != "cuda":
        raise ConfigError(f"engine: {engine} needs a CUDA device, this is {device}; use auto, eager or compile")
    return engine


def set_deterministic(on: bool) -> None:
    """Whether torch may use kernels whose result depends on the order in which threads finish."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's libraries start
    if on != torch.are_deterministic_algorithms_enabled():  # the call below imports the compiler, which takes seconds
        torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not on  # shapes are fixed: the fastest convolutions are looked for once


def prepare(engine: str, step: Step, images: Tensor, labels: Tensor, job) -> Step:
    """The step as the engine runs it. images and labels are an example of its batches, which must all have their shape.
    `job` gives `state_dict()` and `load_state_dict(state)` for everything the step changes, and the `learner` whose
    forward pass is compiled. What the engine cannot do is said once, and the step runs eagerly."""
    if "compile" in engine:
        step = CompiledStep(step, job)
    if "cuda_graph" not in engine:
        return step
    try:
        return GraphStep(step, images, labels, job)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        print(f"warning: no CUDA graph could be captured, training eagerly: {first_line(error)}", file=sys.stderr)
        return step


class CompiledStep:
    """The forward pass is compiled with its backward pass, once for attacks and once for updates, and the elementwise
    work around them (crop, start, sign, clamps) becomes a few fused kernels. Gradients and the optimiser stay outside.
    Compilation happens in the first call: if it fails there (no C++ compiler, say), what that call changed is put
    back, it is said, and steps are run eagerly from then on."""

    def __init__(self, step: Step, job):
        self.eager, self.job, self.tried = step, job, False
        learner = job.learner
        if "forward" not in vars(learner):  # another phase has compiled it
            learner.forward = torch.compile(learner.forward, dynamic=False)
            for name in OUTSIDE:
                setattr(learner, name, torch.compiler.disable(getattr(learner, name)))
        self.run = torch.compile(step, dynamic=False)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        if self.tried:
            return self.run(images, labels)
        self.tried = True
        put_back = keep_state(self.job, images.device)
        try:
            self.run(images, labels)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            put_back()
            print(f"warning: the step could not be compiled, training eagerly: {first_line(error)}", file=sys.stderr)
            for name in ("forward", *OUTSIDE):
                vars(self.job.learner).pop(name, None)
            self.run = self.eager
            self.run(images, labels)


OUTSIDE = ("input_gradient", "update", "update_with_input_gradient", "now")  # of what the compiler sees


def keep_state(job, device: torch.device) -> Callable[[], None]:
    """A function that puts back all that steps change from here on, the random generators included."""
    before, cpu = job.state_dict(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def put_back() -> None:
        job.load_state_dict(before)
        job.learner.optimizer.zero_grad(set_to_none=True)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)

    return put_back


class StaticStep:
    """The step on buffers of its own: a batch is copied in, then the step runs on them."""

    def __init__(self, step: Step, images: Tensor, labels: Tensor):
        self.step, self.images, self.labels = step, images.clone(), labels.clone()

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.run()

    def run(self) -> None:
        self.step(self.images, self.labels)


class GraphStep(StaticStep):
    """The step recorded as one CUDA graph. Recording trains a little; everything that changed is put back, the random
    generator included, so that the first replay is the first step. Raises RuntimeError where it cannot be captured."""

    def __init__(self, step: Step, images: Tensor, labels: Tensor, job):
        super().__init__(step, images, labels)
        put_back = keep_state(job, images.device)
        try:
            warm_up = WARM_UP if job.learner.shared is None else WARM_UP_SHARED
            self.run = record(self.run, images.device, put_back, warm_up)
        finally:
            put_back()


_pool = None  # graphs never run at once: they share one memory pool


def record(
    function: Callable[[], None],
    device: torch.device,
    put_back: Callable[[], None] = lambda: None,
    warm_up: int = WARM_UP,
):
    """`function` as a CUDA graph: call the result to replay it. It is run a few times first, on a stream of its own;
    `put_back` undoes what that changed. Raises RuntimeError where it cannot be captured."""
    global _pool
    _pool = _pool or torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    put_back()
    graph = torch.cuda.CUDAGraph()
    # threads of NCCL may ask for the state of events meanwhile: only this thread's calls are held to the capture's rules
    with torch.cuda.graph(graph, pool=_pool, capture_error_mode="thread_local"):
        function()
    torch.cuda.synchronize(device)
    return graph.replay
