"""Small runs of a Training, how to disturb them, and what must be equal in the end; and steps without a run. The fixtures
that begin and resume runs are in conftest.py."""

from __future__ import annotations

import json
import signal
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastrobust.config import reading
from fastrobust.config.schema import Config
from fastrobust.data.loaders.resident import Resident
from fastrobust.data.sets import ImageSet
from fastrobust.models.preact_resnet import PreActResNet
from fastrobust.runtime import run_directory
from fastrobust.train import step

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
    "options": {
        "method": {"name": "fgsm", "init": "previous"},
        "data__augment": {"crop": "pad", "border": "reflect", "flip": "alternate", "cutout": 5, "mixup": 0.3},
        "phases": [{"epochs": 3, "batch_size": 20, "resolution": 28, "accumulate": 2}],
    },
}
NEWER = {  # methods after the paper, whose state is not that of a place in the batch
    "fgsm_uap": {"name": "fgsm_uap", "stop_gradient": True},
    "class_uap": {"name": "class_uap"},
    "liet": {"name": "liet", "every": 3},
    "fgsm_pgi": {"name": "fgsm_pgi", "reset": 2},
    "trades": {"name": "trades", "steps": 2},
    "n_aaer": {"name": "n_aaer"},
    "rs_cs": {"name": "rs_cs"},
    "gradalign": {"name": "gradalign"},
    "sora": {"name": "sora"},
    "awp": {"name": "awp", "begin": 0, "of": {"name": "class_uap"}},
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
    take, begun = job.step.take, []

    def watched(batch):
        begun.append(1)
        if len(begun) == at:
            act()
        take(batch)

    job.step.take = watched


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


# ---- steps without a run

STEP_METHODS = {
    "standard": {"name": "standard"},
    "fgsm": {"name": "fgsm"},
    "fgsm-previous": {"name": "fgsm", "init": "previous"},
    "fgsm-ibp": {"name": "fgsm", "ibp_weight": 0.3},
    "n_fgsm": {"name": "n_fgsm"},
    "pgd": {"name": "pgd", "steps": 2, "alpha": "2/255", "skip_misclassified": True},
    "free": {"name": "free", "replays": 2},
} | NEWER


def augmented(**keys) -> dict:
    return {"data": {"dataset": "image_folder", "augment": {"crop": "pad", "padding": 2, "flip": True} | keys}}


# what a step has beside its method: changes of the config of `on_noise`
STEP_OPTIONS = {
    "mixup, reflect": augmented(mixup=0.4, border="reflect"),
    "cutmix, cutout, alternate": augmented(cutmix=1.0, cutout=3, flip="alternate", randaugment=2),
    "boosted": {"loss": "boosted", "label_smoothing": 0.1},
    "muon": {"optimizer": {"name": "muon"}},
    "accumulate": {"phases": [{"epochs": 20, "batch_size": 16, "resolution": 8, "accumulate": 4}]},
}


class Noise(NamedTuple):
    """A step, the loader of 50 images of noise that it trains on, in batches of 16, and its config."""

    step: step.Step
    loader: Resident
    config: Config

    def batches(self, count: int):
        return self.loader.batches(0, 0, 16, 0, count)


def on_noise(
    method: str = "fgsm",
    precision: str = "fp32",
    device: str = "cpu",
    warmup: float = 0,
    side: int = 8,
    engine: str = "eager",
    more: dict | None = None,
    network: nn.Module | None = None,
) -> Noise:
    """A step at its start. side: of the images, in pixels; small ones still use all of the network. more: other sections of
    the config. network: in place of one of ours."""
    side = 28 if method == "fgsm-ibp" else side
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, side, side, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    labels = torch.randint(0, 10, (50,), generator=generator)
    settings = {
        "name": "noise",
        "device": device,
        "engine": engine,
        "loader": "resident",
        "precision": precision,
        "epsilon": "8/255",
        "epsilon_warmup": warmup,
        "data": {"dataset": "image_folder", "augment": {"crop": "pad", "padding": 2, "flip": True}},
        "model": {"name": "mnist_net" if side == 28 else "preact_resnet18_w16"},
        "method": STEP_METHODS[method],
        "optimizer": {"name": "sgd"},
        "schedule": {"name": "cyclic", "max_lr": 0.05},
        "phases": [{"epochs": 20, "batch_size": 16, "resolution": side}],
    }
    loader = Resident(ImageSet(pixels, labels, tuple("0123456789"), "made up"), torch.device(device))
    config = reading.parse(settings | (more or {}), "test").with_channels(3)
    return Noise(step.build(config, loader, torch.device(device), network=network), loader, config)


def few_stages(method: str) -> nn.Module | None:
    """A network for `on_noise`, the same each time. Two stages have every kind of block: fewer operators than four."""
    torch.manual_seed(0)
    return None if method == "fgsm-ibp" else PreActResNet(nn.Conv2d(3, 16, 3, padding=1, bias=False), 10, 16, stages=2)


class Steps(NamedTuple):
    """What some steps came to: the learning rate and the sum of losses after each, and all tensors in the end."""

    rates: list[float]
    losses: list[float]
    tensors: dict[str, Tensor]
    state: dict[str, Tensor]


def run_steps(noise: Noise, count: int, prepare=lambda step, batch: step.take) -> Steps:
    """Some steps from one seed, as `prepare(step, the first batch)` runs them: eagerly, if nothing else is said."""
    torch.manual_seed(3)
    run, rates, losses, learner = None, [], [], noise.step.learner
    for batch in noise.batches(count):
        run = run or prepare(noise.step, batch)
        run(batch)
        rates.append(learner.lr.item())
        losses.append(learner.read_sums()[0])
    tensors = {name: t.clone() for name, t in learner.tensors().items()}
    return Steps(rates, losses, tensors, {name: t.clone() for name, t in noise.step.state.items()})
