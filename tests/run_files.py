"""What commands leave and say: the files of a run directory read back, and errors that are explained."""

from __future__ import annotations

import json

import pytest

from fastrobust.models.weights import read_weights, weights_digest

FILES = {
    "evaluations",
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "checkpoint.pt",
    "checkpoint.previous.pt",
    "model.safetensors",
    "summary.json",
    "images.txt.gz",
}


def summary_of(directory):
    return json.loads((directory / "summary.json").read_text())


def digest(run) -> str:
    return weights_digest(read_weights(run)[0])


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def scalars_of(directory):
    """tag -> [(step, value), ...] from the TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_scalars_are_the_metrics(directory):
    metrics, scalars = metrics_of(directory), scalars_of(directory)
    for tag in ("loss", "train_accuracy", "learning_rate", "seconds", "images_per_second"):
        assert [step for step, _ in scalars[tag]] == [record["updates"] for record in metrics]
        assert [value for _, value in scalars[tag]] == pytest.approx([record[tag] for record in metrics], rel=1e-6)
    return scalars


def assert_explained(capsys, code, message):
    err = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in err
    assert err.count("error: ") == 1
    assert message in err
