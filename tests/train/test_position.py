"""Where a run stands, as checkpoints hold it; and checkpoints of the form before, which still resume to the same bits."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from training_runs import METHODS, SGD, assert_same_end, same, stop_at, weights

from fastrobust.runtime import run_directory
from fastrobust.runtime.interrupt import Interrupted
from fastrobust.train.checkpoint import Position, is_position

POSITIONS = [
    Position(),
    Position(phase=1, passes=2, step=7, epoch_seconds=0.25, train_seconds=12.5),
    Position(phase=2, stopped="stopped after epoch 3: made up"),
]


@pytest.mark.parametrize("position", POSITIONS)
def test_a_position_is_read_back_from_json(position):
    facts = position.model_dump(by_alias=True)
    assert facts.keys() == {"phase", "pass", "step", "epoch_seconds", "train_seconds", "stopped"}
    assert facts["pass"] == position.passes
    assert Position.model_validate(json.loads(json.dumps(facts))) == position


def test_a_position_of_a_checkpoint_is_one_that_the_config_has(config_of):
    config = config_of(phases=2 * [{"epochs": 1, "batch_size": 20, "resolution": 28}])
    assert all(is_position(position.model_dump(by_alias=True), config) for position in POSITIONS)
    facts = Position().model_dump(by_alias=True)
    for key, value in (("phase", 3), ("step", -1), ("step", 1.0), ("pass", True), ("train_seconds", float("nan"))):
        assert not is_position(facts | {key: value}, config)
    assert not is_position(facts | {"more": 1}, config) and not is_position(None, config)


def test_a_training_stands_where_its_checkpoint_says(config_of, begin, resume):
    config = config_of()
    job = begin(config)
    stop_at(job, 6)
    with pytest.raises(Interrupted):
        job.train()
    assert (job.position.phase, job.position.passes, job.position.step) == (0, 1, 6)
    assert run_directory.load_checkpoint(job.directory)[1]["position"] == job.position.model_dump(by_alias=True)
    assert resume(config).position == job.position


def as_format_2(tensors: dict, facts: dict, batch: tuple[int, ...]) -> tuple[dict, dict]:
    """The same checkpoint in the form before: every method had a `delta`, and `auto` was left open."""
    tensors, facts = dict(tensors), copy.deepcopy(facts)
    tensors["delta"] = tensors.pop("state.delta", torch.zeros(batch))
    facts["format"] = 2
    facts["config"] |= {"loader": "auto", "engine": "auto"}
    facts["config"]["evaluation"]["alpha"] = None
    return tensors, facts


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_format_2_resumes_to_the_same_bits(config_of, begin, resume, method):
    config = config_of(**METHODS[method], **SGD)
    reference = begin(config, "reference")
    reference.train()
    job = begin(config)
    stop_at(job, 6)
    with pytest.raises(Interrupted):
        job.train()
    tensors, facts = run_directory.load_checkpoint(job.directory)
    assert facts["format"] == 3
    assert ("state.delta" in tensors) == (method in ("fgsm previous", "free", "options"))
    run_directory.save_checkpoint(job.directory, *as_format_2(tensors, facts, (20, 3, 28, 28)))
    again = resume(config)
    assert same(weights(again), weights(job)) and same(again.step.state, job.step.state)
    again.train()
    assert_same_end(again, reference)
