"""One run in many processes, as `torchrun` starts them: who this process is, and how the processes talk.

Gradients are averaged by DistributedDataParallel, in the training pass alone (`Learner.share_gradients`). Everything else
that the processes must agree on goes through a `World`: small host-side values over gloo, so that no GPU waits for it.
Process 0 alone writes files and prints. Without torchrun the world is one process and every method is trivial.
"""

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastrobust.runtime import cuda_graph, limits
from fastrobust.runtime.errors import ConfigError, FastrobustError, first_line
from fastrobust.runtime.interrupt import RESUME_ME, Stop

Value = TypeVar("Value")
PATIENCE = timedelta(minutes=30)  # for one process to wait for another: an evaluation's shares may be that uneven


class Lost(FastrobustError):
    """Another process has ended. `status` is the exit status that says that the run can be resumed."""

    def __init__(self, error: BaseException):
        super().__init__(f"another process was lost ({first_line(error)[:200]}); a run goes on with --resume")
        self.status = RESUME_ME


class AlreadySaid(FastrobustError):
    """Process 0 has said what was wrong; this process ends with the same status, silently."""

    def __init__(self, status: int):
        super().__init__("process 0 said what was wrong")
        self.status, self.silent = status, True


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`, number `local` on its machine. `joined`: torchrun started it, even if it is the only one."""

    rank: int = 0
    size: int = 1
    local: int = 0
    joined: bool = False

    def first(self, action: Callable[[], Value]) -> Value:
        """What `action` returns in process 0, which alone runs it, in every process. Its FastrobustError is raised there,
        and AlreadySaid in the others."""
        if self.size == 1:
            return action()
        outcome: list[Any] = [None, None]
        raised = None
        if self.rank == 0:
            try:
                outcome[0] = action()
            except (FastrobustError, Stop) as error:
                raised, outcome[1] = error, getattr(error, "status", 2)
        torch.distributed.broadcast_object_list(outcome, src=0)
        if raised is not None:
            raise raised
        if outcome[1] is not None:
            raise AlreadySaid(outcome[1])
        return outcome[0]

    def gather(self, value: Value) -> list[Value]:
        """The value of every process, by rank, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def total(self, *numbers: float) -> list[float]:
        """Each number summed over the processes."""
        return [sum(parts) for parts in zip(*self.gather(numbers), strict=True)]

    def average_(self, tensors: list[Tensor]) -> None:
        """Each tensor becomes its mean over the processes, in place."""
        if self.size > 1:
            for t in tensors:
                torch.distributed.all_reduce(t)
                t.div_(self.size)

    @contextlib.contextmanager
    def one_after_the_other(self, needed: bool) -> Iterator[None]:
        """If needed, the first process of each machine goes through the block before the others (a download)."""
        needed = needed and self.size > 1
        if needed and self.local:
            self.gather(None)
        yield
        if needed and not self.local:
            self.gather(None)


ALONE = World()


def is_lost(error: BaseException) -> bool:
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Timed out waiting")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in words)


def from_environment() -> World:
    """Who this process is, by the variables that torchrun sets."""
    try:
        rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError):
        return ALONE
    return World(rank, size, local, True) if "MASTER_ADDR" in os.environ else ALONE


def on_this_machine(size: int) -> int:
    """How many of a world's processes share the cores of this machine."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(size, int(told)) if told.isdecimal() and int(told) else size


def restarted() -> bool:
    """Whether torchrun has started this process anew after one had died (`--max-restarts`)."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


@contextlib.contextmanager
def joined(name: str) -> Iterator[tuple[World, torch.device]]:
    """Inside, this process is part of its world. Gives the world and the device that the config's `device: name` stands for
    in this process: with torchrun each has a GPU of its own. The end of another process, which shows as an error of
    communication, is raised as Lost."""
    world = from_environment()
    device = pick_device(name, world)
    if not world.joined:
        yield world, device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        torch.distributed.init_process_group(
            backend, store=common_store(world), rank=world.rank, world_size=world.size, timeout=PATIENCE
        )
    except (RuntimeError, ValueError) as error:
        where = os.environ["MASTER_ADDR"]
        raise FastrobustError(
            f"process {world.rank} of {world.size} cannot reach the others at {where}: {first_line(error)}"
        ) from None
    shown = sys.stdout
    try:
        if world.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (closed below)
        yield world, device
    except FastrobustError as error:
        if world.rank and isinstance(error, ConfigError):  # the same in all processes: process 0 says it
            error.silent = True
        elif world.rank:
            error.args = (f"process {world.rank} of {world.size}: {error}",)
        raise
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise Lost(error) from None
    finally:
        if world.rank:
            sys.stdout.close()
            sys.stdout = shown
        if device.type == "cuda":
            cuda_graph.reset_all()
        torch.distributed.destroy_process_group()


def common_store(world: World) -> torch.distributed.Store:
    """The store through which the processes find each other, under a name that only living processes know: torchrun keeps
    one store over its restarts, and would have them wait for the addresses that dead processes left in it. Process 0
    answers whoever is at the door until every other process has heard the name. Raises RuntimeError after PATIENCE."""
    store, *_ = next(torch.distributed.rendezvous("env://", timeout=PATIENCE))
    token, deadline = uuid.uuid4().hex, time.monotonic() + PATIENCE.total_seconds()
    if world.rank:
        store.set(f"door {world.rank}", token)
        name = store.get(f"name for {token}").decode()  # waits for it
        store.set(f"{name} heard by {world.rank}", "yes")
        return torch.distributed.PrefixStore(name, store)
    missing = set(range(1, world.size))
    while missing:
        for rank in sorted(missing):
            if store.check([f"door {rank}"]):  # perhaps a dead process's: then nobody hears the answer
                store.set(f"name for {store.get(f'door {rank}').decode()}", token)
            if store.check([f"{token} heard by {rank}"]):
                missing.remove(rank)
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {sorted(missing)} did not come")
        time.sleep(0.01)
    return torch.distributed.PrefixStore(token, store)


def pick_device(name: str, world: World = ALONE) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device. Raises ConfigError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world.joined:
        name = f"cuda:{world.local}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: there is no device '{name}'; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: {name} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        torch.set_num_threads(min(torch.get_num_threads(), max(1, limits.cores() // on_this_machine(world.size))))
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        there = f"this machine has {torch.cuda.device_count()} CUDA device(s)"
        each = "; torchrun starts one process for each (--nproc-per-node)" if world.joined else ""
        raise ConfigError(f"device: {name} is not there; {there}{each}")
    if device.index is not None and world.size > 1 and device.index != world.local:
        raise ConfigError(f"device: {name} cannot be shared by {world.size} processes: leave it at auto or cuda")
    return device
