"""What a checkpoint holds, and whether it belongs to a run: its config, its data, and a place in it that there is.

One file serves any number of processes: the kept delta is that of the whole batch, the sums are over all processes, and what
else process r has of its own (random generators, BatchNorm's running averages) is stored as `rank{r}.…`, for r = 0 plainly.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrobust import config as config_module
from fastrobust.errors import RunError
from fastrobust.run import CONFIG
from fastrobust.schema import Config


def pack(job) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of a trainer in all its processes, which must call this together: (tensors, facts for JSON)."""
    state, world = job.state_dict(), job.world
    tensors = {f"learner.{name}": t for name, t in state["tensors"].items()} | {"delta": state["delta"]}
    tensors |= {f"good.{name}": t for name, t in job.good.items()} | _generators(job)
    if world.size > 1:
        totals = world.total(*job.learner.read_sums())
        for name, total in zip(("loss_sum", "correct", "seen"), totals, strict=True):
            tensors[f"learner.sums.{name}"].fill_(total)
        own = _generators(job) | {f"learner.model.{name}": t.cpu() for name, t in job.learner.model.named_buffers()}
        if job.keeps_delta:
            own["delta"] = job.delta.cpu()
        every = world.gather(own)
        tensors["delta"] = torch.cat([part.pop("delta", job.delta.cpu()) for part in every])
        tensors |= {f"rank{r}.{name}": t for r, part in enumerate(every) if r for name, t in part.items()}
    return tensors, {
        "format": 2,
        "config": job.config.to_dict(),
        "position": job.position,
        "history": job.history,
        "scaler": state["scaler"],
        "good_epoch": job.good_epoch,
        "data": job.data_checksum,
        "examples": len(job.loader),
        "processes": world.size,
    }


def unpack(job, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Put a trainer where a checkpoint stands. Raises RunError if it belongs to another config or other data. With another
    number of processes than before, training goes on at the same place, with other random numbers."""
    check(job.directory, facts, job.config, job.loader)
    before, (rank, size) = facts.get("processes", 1), job.shard
    if before != size:
        print(f"{job.directory}: begun by {before} process(es), now {size}: other random numbers", flush=True)
    own = {name.removeprefix(f"rank{rank}."): t for name, t in tensors.items() if name.startswith(f"rank{rank}.")}
    tensors = tensors | own

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    try:
        job.position, job.history, job.good_epoch = facts["position"], facts["history"], facts["good_epoch"]
        job.enter_phase()
        whole, mine = tensors["delta"], len(job.delta)
        if len(whole) != mine * size:
            raise RuntimeError(f"delta is for a batch of {len(whole)}, not {mine * size}")
        delta = whole[rank * mine : (rank + 1) * mine]
        job.load_state_dict({"tensors": part("learner."), "scaler": facts["scaler"], "delta": delta})
        torch.set_rng_state(tensors["rng.cpu"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise RunError(f"the checkpoint in {job.directory} does not fit its config: {error}") from None
    job.good = {name: t.to(job.device) for name, t in part("good.").items()}
    if job.device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"], job.device)
    if rank:
        job.learner.reset_sums()  # process 0 has the sums of all
        if not own:
            job.seed_of_rank(int(job.learner.updates))


def _generators(job) -> dict[str, Tensor]:
    found = {"rng.cpu": torch.get_rng_state()}
    if job.device.type == "cuda":
        found["rng.cuda"] = torch.cuda.get_rng_state(job.device)
    return found


def check(run: Path, facts: dict[str, Any], config: Config, loader) -> None:
    """Raise RunError if a checkpoint's facts come from another config or other training data than those of the loader, or
    are not those of a run."""
    odd = config_module.changed_since(facts.get("config"), config)
    if odd:
        raise RunError(
            f"{run / CONFIG} was changed since its checkpoint was written:\n  "
            + "\n  ".join(odd[:8])
            + "\nPut it back, or start a new run with `name=NAME`"
        )
    if facts.get("examples") != len(loader):
        raise RunError(
            f"the run was begun on {facts.get('examples')} images, but there are {len(loader)} now in {loader.source}"
        )
    if facts.get("data") != loader.checksum:
        raise RunError(
            f"the images or labels in {loader.source} are not those that the run was begun on: their checksum was "
            f"{str(facts.get('data'))[:12]}, now it is {loader.checksum[:12]}. "
            "Put them back, or start a new run with `name=NAME`"
        )
    if not is_position(facts.get("position"), config) or not is_history(facts.get("history")):
        raise RunError(f"the checkpoint in {run} does not fit its config: it stands at {facts.get('position')!r:.200}")


def is_position(position: Any, config: Config) -> bool:
    """Whether this is the `position` of a trainer of such a run."""
    return (
        isinstance(position, dict)
        and position.keys() == {"phase", "pass", "step", "epoch_seconds", "train_seconds", "stopped"}
        and all(type(position[key]) is int and position[key] >= 0 for key in ("phase", "pass", "step"))
        and all(type(position[key]) is float and math.isfinite(position[key]) for key in ("epoch_seconds", "train_seconds"))
        and position["phase"] <= len(config.phases)
        and (position["stopped"] is None or isinstance(position["stopped"], str))
    )


def is_history(history: Any) -> bool:
    return isinstance(history, list) and all(isinstance(record, dict) and "epoch" in record for record in history)
