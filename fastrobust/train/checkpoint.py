"""What a checkpoint holds, and whether it belongs to a run: its config, its data, and a place in it that there is.

One file serves any number of processes: what a method keeps for each place in the batch is that of the whole batch, the
sums are over all processes, and what else process r has of its own (random generators, BatchNorm's running averages, other
state of the method) is stored as `rank{r}.…`, for r = 0 plainly.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from fastrobust.config import reading
from fastrobust.config.schema import Config
from fastrobust.runtime import run_directory
from fastrobust.runtime.command import to_paste
from fastrobust.runtime.errors import RunError
from fastrobust.runtime.run_directory import CONFIG
from fastrobust.train.step import seed_of_rank

Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Position(BaseModel):
    """Where a run stands: in its `phase`, so many whole passes and steps of that phase are done. epoch_seconds: what an
    unfinished pass has taken so far. train_seconds: all whole passes. stopped: why the guard ended the run."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    phase: Annotated[int, Field(strict=True, ge=0)] = 0
    passes: Annotated[int, Field(strict=True, ge=0, alias="pass")] = 0
    step: Annotated[int, Field(strict=True, ge=0)] = 0
    epoch_seconds: Finite = 0.0
    train_seconds: Finite = 0.0
    stopped: Annotated[str, Field(strict=True)] | None = None


def pack(training) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of a run in all its processes, which must call this together: (tensors, facts for JSON)."""
    stored, world, learner = training.step.state_dict(), training.world, training.learner
    tensors = {f"learner.{name}": t for name, t in stored["tensors"].items()}
    tensors |= {f"state.{name}": t for name, t in stored["state"].items()}
    tensors |= {f"good.{name}": t for name, t in training.good.items()} | _generators(training)
    tensors |= {f"best.{name}": t for name, t in training.best.items()}
    if training.robust_before is not None:
        tensors["guard.robust"] = training.robust_before
    if world.size > 1:
        totals = world.total(*learner.read_sums())
        for name, total in zip(("loss_sum", "correct", "seen"), totals, strict=True):
            tensors[f"learner.sums.{name}"].fill_(total)
        own = _generators(training) | {f"learner.model.{name}": t.cpu() for name, t in learner.model.named_buffers()}
        if learner.average is not None:
            own |= {f"learner.averaged.{name}": t.cpu() for name, t in learner.average.buffers().items()}
        agreed = training.step.method.agreed
        own |= {f"state.{name}": t.cpu() for name, t in stored["state"].items() if name not in agreed}
        every = world.gather(own)
        for name in stored["state"].keys() & set(training.step.method.by_slot):
            tensors[f"state.{name}"] = torch.cat([part.pop(f"state.{name}") for part in every])
        tensors |= {f"rank{r}.{name}": t for r, part in enumerate(every) if r for name, t in part.items()}
    return tensors, {
        "format": 3,
        "config": training.config.to_dict(),
        "position": training.position.model_dump(by_alias=True),
        "history": list(training.history),
        "scaler": stored["scaler"],
        "good_epoch": training.good_epoch,
        "selected": training.selected,
        "data": training.data_checksum,
        "examples": len(training.loader),
        "processes": world.size,
    }


def to_host(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """(the tensors in the host's memory, a function that waits until they are there). The copies are begun in the order of
    the device's work and nothing waits for them: what comes later can change the tensors."""
    devices = {t.device for t in tensors.values() if t.is_cuda}
    if not devices:
        return tensors, lambda: None
    copies = {}
    for name, t in tensors.items():
        copies[name] = torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True) if t.is_cuda else t
    events = [torch.cuda.current_stream(device).record_event() for device in devices]
    return copies, lambda: [event.synchronize() for event in events] and None


def unpack(training, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Put a run where a checkpoint stands. Raises RunError if it belongs to another config or other data. With another
    number of processes than before, training goes on at the same place, with other random numbers."""
    directory, step, (rank, size) = training.directory, training.step, (training.world.rank, training.world.size)
    check(directory, facts, training.config, training.loader)
    before = facts.get("processes", 1)
    if before != size:
        print(f"{directory}: begun by {before} process(es), now {size}: other random numbers", flush=True)
    own = {name.removeprefix(f"rank{rank}."): t for name, t in tensors.items() if name.startswith(f"rank{rank}.")}
    tensors = tensors | own
    if "delta" in tensors:  # format 2 called the state of `free` and `previous` so
        tensors["state.delta"] = tensors.pop("delta")

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    try:
        training.position = Position.model_validate(facts["position"])
        training.history, training.good_epoch = facts["history"], facts["good_epoch"]
        training.enter_phase()
        state = part("state.")
        for name in step.state.keys() & set(step.method.by_slot):
            whole, mine = state[name], len(step.state[name])
            if len(whole) != mine * size:
                raise RuntimeError(f"{name} is for a batch of {len(whole)}, not {mine * size}")
            state[name] = whole[rank * mine : (rank + 1) * mine]
        step.load_state_dict({"tensors": part("learner."), "scaler": facts["scaler"], "state": state})
        torch.set_rng_state(tensors["rng.cpu"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise RunError(f"the checkpoint in {directory} does not fit its config: {error}") from None
    training.good = {name: t.to(training.device) for name, t in part("good.").items()}
    training.best = {name: t.to(training.device) for name, t in part("best.").items()}
    training.selected = facts.get("selected")
    training.robust_before = tensors.get("guard.robust")
    if training.device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"], training.device)
    if rank:
        training.learner.reset_sums()  # process 0 has the sums of all
        if not own:
            seed_of_rank(training.config, training.world, int(training.learner.updates))


def _generators(training) -> dict[str, Tensor]:
    found = {"rng.cpu": torch.get_rng_state()}
    if training.device.type == "cuda":
        found["rng.cuda"] = torch.cuda.get_rng_state(training.device)
    return found


def check(run: Path, facts: dict[str, Any], config: Config, loader) -> None:
    """Raise RunError if a checkpoint's facts come from another config or other training data than those of the loader, or
    are not those of a run."""
    odd = reading.changed_since(facts.get("config"), config)
    if odd:
        raise RunError(
            f"{run / CONFIG} was changed since its checkpoint was written:\n  "
            + "\n  ".join(odd[:8])
            + "\nPut it back, or start a new run with `name=NAME`"
        )
    refuse_other_images(run, loader)
    if facts.get("examples") != len(loader):
        raise RunError(
            f"the run was begun on {facts.get('examples')} images, but there are {len(loader)} now in {loader.source}: "
            f"put them back, or start anew: {anew(run)}"
        )
    if facts.get("data") != loader.checksum:
        raise RunError(
            f"the images or labels in {loader.source} are not those that the run was begun on: their checksum was "
            f"{str(facts.get('data'))[:12]}, now it is {loader.checksum[:12]}. "
            "Put them back, or start a new run with `name=NAME`"
        )
    history = facts.get("history")
    whole = isinstance(history, list) and all(isinstance(record, dict) and "epoch" in record for record in history)
    if not whole or not is_position(facts.get("position"), config):
        raise RunError(f"the checkpoint in {run} does not fit its config: it stands at {facts.get('position')!r:.200}")


def refuse_other_images(run: Path, loader) -> None:
    """Raise RunError, which names the files, where the training images are not those of the list that the run was begun
    with."""
    before, names = run_directory.read_images(run), run_directory.as_lines(getattr(loader, "names", ()))
    if before is None or not names or before == names:
        return
    gone, new = sorted(set(before) - set(names)), sorted(set(names) - set(before))
    changes = [
        f"{len(files)} {what} ({first_few(files)})" for files, what in ((gone, "gone or unusable"), (new, "new")) if files
    ]
    raise RunError(
        f"{run} was begun on {len(before)} training images; there are {len(names)} now in {loader.source}: "
        f"{' and '.join(changes) or 'in another order'}.\n"
        "Every batch is drawn from the whole list, so with another list this would be another training.\n"
        "To go on, make the files what they were (put good copies back, take new ones away), and resume.\n"
        f"To train on what is there now: {anew(run)}"
    )


def first_few(files: list[str]) -> str:
    return ", ".join(files[:5]) + (f", and {len(files) - 5} more" if len(files) > 5 else "")


def anew(run: Path) -> str:
    """The command that starts a run again from the beginning, beside the old one."""
    return to_paste("train", run / CONFIG, f"name={run.name}-2")


def is_position(facts: Any, config: Config) -> bool:
    """Whether this is the `position` of a training of such a config."""
    try:
        position = Position.model_validate(facts)
        return position.phase <= len(config.phases) and position.model_fields_set == Position.model_fields.keys()
    except ValidationError:
        return False
