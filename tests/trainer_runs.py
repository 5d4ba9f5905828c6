"""Small runs of a Trainer, how to disturb them, and what must be equal in the end. Their fixtures are in conftest.py."""

from __future__ import annotations

import json
import signal

import torch

from fastrobust.runtime import run_directory

CPU = torch.device("cpu")
SMALL = {"data__limit": 65, "phases": [{"epochs": 3, "batch_size": 20, "resolution": 28}]}  # updates: 4, 7, 10
SGD = {"optimizer": {"name": "sgd"}, "schedule": {"name": "cyclic", "max_lr": 0.05}}
METHODS = {
    "standard": {"method": {"name": "standard"}},
    "fgsm random": {"method": {"name": "fgsm", "init": "random"}},
    "fgsm ibp": {"method": {"name": "fgsm", "ibp_weight": 0.2}, "epsilon_warmup": 2},
    "fgsm previous": {"method": {"name": "fgsm", "init": "previous"}},
    "pgd": {"method": {"name": "pgd", "steps": 2, "alpha": 0.03, "skip_misclassified": True}},
    "free": {"method": {"name": "free", "replays": 2}, "phases__0__epochs": 6},
    "n_fgsm": {"method": {"name": "n_fgsm"}},
    "warm-up": {"method": {"name": "fgsm"}, "epsilon_warmup": 2},
}
TWO_PHASES = {
    "model__name": "preact_resnet18_w16",
    "data__limit": 25,
    "data__augment": {"crop": "random_resized", "flip": True},
    "method": {"name": "fgsm", "init": "previous"},
    "phases": [
        {"epochs": 2, "batch_size": 10, "resolution": 8, "resize": 12},  # updates: 3, 5
        {"epochs": 2, "batch_size": 7, "resolution": 12, "resize": 16},  # then 4, 8
    ],
    **SGD,
}


def crash():
    raise ZeroDivisionError


def before_step(job, at, act):
    """Call act() when `at` training steps have been begun, before the step is taken."""
    step, begun = job.step.take, []

    def train_step(*batch):
        begun.append(1)
        if len(begun) == at:
            act()
        step(*batch)

    job.step.take = train_step


def stop_at(job, at):
    """A signal arrives while the step `at` is under way."""
    before_step(job, at, lambda: job._note_signal(signal.SIGTERM, None))


def weights(job):
    return {name: t.clone() for name, t in job.learner.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_times(records):
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in records]


def assert_same_end(job, reference):
    """All that training leaves behind is equal, except for how long it took."""
    assert same(weights(job), weights(reference))
    (tensors, facts), (expected, expected_facts) = (run_directory.load_checkpoint(j.directory) for j in (job, reference))
    assert tensors.keys() == expected.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], expected[name])] == []
    for found in (facts, expected_facts):
        found["history"] = without_times(found["history"])
        for key in ("train_seconds", "epoch_seconds"):
            assert found["position"].pop(key) >= 0
    assert facts == expected_facts
    lines = [
        [json.loads(line) for line in (j.directory / run_directory.METRICS).read_text().splitlines()]
        for j in (job, reference)
    ]
    assert without_times(lines[0]) == without_times(lines[1]) == expected_facts["history"]
