"""What a model answers: the same for the same images, or not."""

from __future__ import annotations

import pytest
import torch
from attack_runs import few_images, run
from torch import nn

from fastrobust.evaluation.answers import unsteady


def network(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), *layers, nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))


class AlwaysDropout(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, training=True)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([], None),
        ([nn.BatchNorm2d(4)], None),
        ([nn.Dropout(0.5)], None),
        ([AlwaysDropout()], "different answers for the same images"),
        ([nn.BatchNorm2d(4, track_running_stats=False)], "other images of a batch"),
    ],
    ids=["plain", "BatchNorm", "dropout in eval mode", "dropout always", "BatchNorm of the batch"],
)
def test_what_depends_on_chance_or_on_the_batch_is_said_once(layers, words, capsys):
    data = few_images()
    model = network(*layers)
    model(data.images[:2].float())
    state, training = torch.get_rng_state(), [module.training for module in model.modules()]
    said = unsteady(model, data.images)
    assert words is None if said is None else words in said
    assert torch.equal(torch.get_rng_state(), state) and [m.training for m in model.modules()] == training
    run(model, data, ["pgd-1-1"])
    assert capsys.readouterr().err.count("warning: the model") == (words is not None)
