"""Recording work on a GPU as a CUDA graph, once, and replaying it.

One memory pool and one stream for each device serve all graphs. The pool is owned here: in torch before 2.12 a pool that is
only named (`graph_pool_handle`) dies with its last graph, and the next capture into it fails. On the stream run the warm-up,
the captures and DistributedDataParallel.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator

import torch

_pools: dict[int, torch.cuda.MemPool] = {}
_streams: dict[int, torch.cuda.Stream] = {}
_graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()  # those that may be replayed


def number_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def stream_of(device: torch.device) -> torch.cuda.Stream:
    """The device's stream for warm-up, captures and DistributedDataParallel."""
    number = number_of(device)
    if number not in _streams:
        _streams[number] = torch.cuda.Stream(number)
    return _streams[number]


@contextlib.contextmanager
def on_stream(device: torch.device) -> Iterator[None]:
    """Inside, work goes to the device's own stream; it begins after what was begun before, and what follows waits for it."""
    stream = stream_of(device)
    with torch.cuda.device(number_of(device)):
        before = torch.cuda.current_stream()
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            yield
        before.wait_stream(stream)


def record(
    function: Callable[[], None],
    device: torch.device,
    put_back: Callable[[], None] = lambda: None,
    warm_up: int = 3,
) -> Callable[[], None]:
    """`function` as a CUDA graph: call the result to replay it. It is run a few times first; `put_back` undoes what that
    changed. Raises RuntimeError where it cannot be captured; then the device is as it was, and work can go on eagerly."""
    number = number_of(device)
    with on_stream(device):
        for _ in range(warm_up):
            function()
    put_back()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(number), _no_collection():
        before = torch.cuda.current_stream()
        if number not in _pools:
            _pools[number] = torch.cuda.MemPool()
        try:
            # threads of NCCL may ask for the state of events meanwhile: only this thread's calls are held to the rules
            with torch.cuda.graph(
                graph, pool=_pools[number].id, stream=stream_of(device), capture_error_mode="thread_local"
            ):
                function()
        except BaseException as error:
            _leave_capture(number, before)
            raise _cause(error) from None
        torch.cuda.synchronize()
    _graphs.add(graph)
    return graph.replay


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Inside, no garbage is collected: an old graph that is freed within a capture would end it."""
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _leave_capture(number: int, before: torch.cuda.Stream) -> None:
    """Undo what torch leaves behind when a capture fails: its stream current, its pool in use, and random numbers that wait
    for a replay."""
    torch.cuda.set_stream(before)
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(number, _pools[number].id)
    del _pools[number]
    generator = torch.cuda.default_generators[number]
    generator.graphsafe_set_state(generator.clone_state())


def _cause(error: BaseException) -> BaseException:
    """What went wrong in a capture, rather than what followed from it."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    return first if isinstance(first, RuntimeError) else error


def reset_all() -> None:
    """Free all graphs: NCCL's communicators wait at their end for the graphs that hold their work."""
    for graph in list(_graphs):
        graph.reset()
    _graphs.clear()
