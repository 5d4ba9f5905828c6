"""Real CIFAR-10 images: the pre-activation ResNet-18 learns with every method. Skips without FASTROBUST_DATA."""

from pathlib import Path

import pytest
import torch

from fastrobust.config import reading
from fastrobust.data import sets
from fastrobust.runtime.errors import DataError
from fastrobust.train.training import Training

METHODS = {
    "standard": {"name": "standard"},
    "fgsm": {"name": "fgsm"},
    "n_fgsm": {"name": "n_fgsm"},
    "pgd": {"name": "pgd", "steps": 2, "alpha": "4/255"},
    "free": {"name": "free", "replays": 2},
}


@pytest.fixture(scope="module")
def cifar() -> sets.ImageSet:
    try:
        sets.locate("cifar10")
    except DataError:
        pytest.skip("needs CIFAR-10 in $FASTROBUST_DATA")
    return sets.load("cifar10", "train", limit=32)


@pytest.mark.parametrize("method", METHODS)
def test_loss_falls(cifar, method):
    """Repeated on 32 images, 10 updates: the mean adversarial loss of the last three is well below the first's."""
    settings = {
        "name": "cifar",
        "epsilon": "2/255",
        "data": {"dataset": "cifar10"},
        "model": {"name": "preact_resnet18"},
        "method": METHODS[method],
        "optimizer": {"name": "sgd"},
        "schedule": {"name": "points", "points": [[0, 0.02], [10, 0.02]]},
        "phases": [{"epochs": 10, "batch_size": 16}],
    }
    job = Training(reading.parse(settings, "test"), Path("unused"), torch.device("cpu"), cifar)
    losses = []
    for x, y in job.loader.batches(0, 0, 16, 0, 12 // job.config.replays):
        job.learner.reset_sums()
        job.step.take(x, y)
        loss_sum, _, seen = job.learner.read_sums()
        losses.append(loss_sum / seen)
    assert sum(losses[-2:]) / 2 < 0.9 * losses[0], losses
