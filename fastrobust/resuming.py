"""Whether a checkpoint belongs to a run: its config, its data, and a place in it that there is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fastrobust import config as config_module
from fastrobust.errors import RunError
from fastrobust.run import CONFIG
from fastrobust.schema import Config


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
