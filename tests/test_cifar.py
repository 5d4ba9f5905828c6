"""Real CIFAR-10 images: the pre-activation ResNet-18 learns with every method. Skips without FASTROBUST_DATA."""

import pytest
from training_runs import CPU

from fastrobust.config import reading
from fastrobust.data import loaders, sets
from fastrobust.runtime.distributed import ALONE
from fastrobust.runtime.errors import DataError
from fastrobust.train import start
from fastrobust.train.step import build

METHODS = {
    "standard": {"name": "standard"},
    "fgsm": {"name": "fgsm"},
    "n_fgsm": {"name": "n_fgsm"},
    "pgd": {"name": "pgd", "steps": 2, "alpha": "4/255"},
    "free": {"name": "free", "replays": 2},
}


@pytest.fixture(scope="module", autouse=True)
def cifar() -> None:
    try:
        sets.locate("cifar10")
    except DataError:
        pytest.skip("needs CIFAR-10 in $FASTROBUST_DATA")


@pytest.mark.parametrize("method", METHODS)
def test_loss_falls(method):
    """Repeated on 32 images, 10 updates: the mean adversarial loss of the last three is well below the first's."""
    settings = {
        "name": "cifar",
        "epsilon": "2/255",
        "data": {"dataset": "cifar10", "limit": 32},
        "model": {"name": "preact_resnet18"},
        "method": METHODS[method],
        "optimizer": {"name": "sgd"},
        "schedule": {"name": "points", "points": [[0, 0.02], [10, 0.02]]},
        "phases": [{"epochs": 10, "batch_size": 16}],
    }
    config = start.resolve(reading.parse(settings, "test"), CPU, ALONE)
    loader = loaders.Phases(config, CPU).enter(0)
    step, losses = build(config, loader, CPU), []
    for batch in loader.batches(0, 0, 16, 0, 12 // config.replays):
        step.learner.reset_sums()
        step(batch)
        loss_sum, _, seen = step.learner.read_sums()
        losses.append(loss_sum / seen)
    assert sum(losses[-2:]) / 2 < 0.9 * losses[0], losses
