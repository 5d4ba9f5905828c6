"""The floating-point operations of a training, counted without doing it."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from fastrobust.config.schema import Config
from fastrobust.data.batch import Batch
from fastrobust.runtime.operations import Operations
from fastrobust.train import step


@dataclass(frozen=True)
class Facts:
    """What a step asks of a loader."""

    channels: int
    classes: tuple[str, ...]
    examples: int
    crops: bool = True  # cropping takes no operation that is counted

    def __len__(self) -> int:
        return self.examples


_known: dict[tuple, list[int]] = {}  # many runs of a sweep ask the same


def of_steps(config: Config, loader, network: nn.Module | None = None) -> list[int] | None:
    """The operations of one step in each phase, those of all processes together: every pass of attack and update. As usual
    these are the multiplications and additions of convolutions and matrix products. A step is made with tensors that have
    shapes and no values. None where the model or the method does not allow that."""
    plain = {"engine": "eager", "precision": "fp32", "deterministic": False, "name": "work", "seed": 0, "output": ""}
    config = config.model_copy(update=plain)
    facts = Facts(loader.channels, loader.classes, len(loader))
    key = config.to_yaml(), facts
    if network is None and key in _known:
        return _known[key]
    deterministic = torch.are_deterministic_algorithms_enabled()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            found = _counted(config, facts, network)
    except Exception:  # a model of someone's own may do anything
        return None
    finally:
        torch.use_deterministic_algorithms(deterministic)
    if network is None:
        _known[key] = found
    return found


def _counted(config: Config, facts: Facts, network: nn.Module | None) -> list[int]:
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a while

    copied = None if network is None else copy.deepcopy(network).cpu()
    made, found = step.build(config, facts, torch.device("cpu"), network=copied), []
    made.learner.looks = False  # the alignment of gradients, at some steps, is the guard's
    for phase in config.phases:
        made.enter_phase(phase.batch_size, facts.channels, phase.resolution, phase.accumulate)
        with FakeTensorMode(allow_non_fake_inputs=True), Operations() as counted:
            made.take(batch_of(phase, facts.channels))
        found.append(counted.number)
    return found


def batch_of(phase, channels: int) -> Batch:
    size, side = phase.batch_size, phase.resolution
    images = torch.empty(size, channels, side, side, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    return Batch(images, torch.zeros(size, dtype=torch.int64), torch.arange(size))


def pflop(config: Config, history: list[dict], loader, network: nn.Module | None = None) -> float | None:
    """The work of the training steps that a run's history tells of, in PFLOP. What guard, selection and evaluation did is
    not among them."""
    each = of_steps(config, loader, network)
    if each is None:
        return None
    updates = Counter()
    for before, now in itertools.pairwise([{"updates": 0}, *history]):
        updates[now["phase"]] += now["updates"] - before["updates"]
    return sum(each[phase] * count for phase, count in updates.items()) / config.replays / 1e15
