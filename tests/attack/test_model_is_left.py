"""An attack leaves the model as it was: its modes, gradients and tensors, also where it fails on the way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastrobust.attack.pgd import pgd
from fastrobust.attack.threat import Threat
from fastrobust.attack.verdicts import classified
from fastrobust.data.augment import to_unit
from fastrobust.data.sets import ImageSet
from fastrobust.evaluation.accuracy import evaluate


@pytest.mark.parametrize("failing", [False, True], ids=["finished", "failed"])
@pytest.mark.parametrize("entry", ["classified", "pgd", "evaluate"])
def test_the_model_is_left_as_it_was(entry, failing):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Flatten(), nn.Linear(4 * 12 * 12, 10),
    )  # fmt: skip
    network.train()
    network[1].eval()
    network[3][1].eval()
    network[0].weight.requires_grad_(False)
    for p in (network[0].bias, network[5].weight):
        p.grad = torch.randn_like(p)
    calls, fails_at = [], 1 if entry == "classified" else 5  # batches of 5: 3 clean forward passes, then the attack

    def watch(module, inputs):
        calls.append(1)
        assert not any(m.training for m in network.modules())
        assert not any(p.requires_grad for p in network.parameters())
        if failing and len(calls) == fails_at:
            raise KeyboardInterrupt

    images = torch.randint(0, 256, (12, 3, 14, 14), dtype=torch.uint8)
    with torch.no_grad():
        labels = copy.deepcopy(network).eval()(to_unit(images)).argmax(1)  # no image is misclassified: all are attacked
    hook = network.register_forward_pre_hook(watch)
    modes = [m.training for m in network.modules()]
    flags = [p.requires_grad for p in network.parameters()]
    gradients = [p.grad if p.grad is None else p.grad.clone() for p in network.parameters()]
    tensors = {name: t.clone() for name, t in network.state_dict().items()}
    attack = {"alpha": 1e-6, "steps": 2, "restarts": 2, "batch_size": 5}
    act = {
        "classified": lambda: classified(network, images, labels),
        "pgd": lambda: pgd(network, images, labels, threat=Threat(1e-6), **attack),
        "evaluate": lambda: evaluate(network, ImageSet(images, labels, (), ""), epsilon=1e-6, **attack),
    }[entry]
    if failing:
        with pytest.raises(KeyboardInterrupt):
            act()
        assert len(calls) == fails_at
    else:
        act()
        told = 4 * (entry == "evaluate")  # by which the model's code is known, and that its answers are steady
        assert len(calls) == (
            1 if entry == "classified" else 3 + told + 2 * 3 * 3
        )  # 3 batches: clean, 2 restarts of 3 points
    hook.remove()

    assert [m.training for m in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == flags
    for p, gradient in zip(network.parameters(), gradients, strict=True):
        assert p.grad is None if gradient is None else torch.equal(p.grad, gradient)
    for name, t in network.state_dict().items():
        assert torch.equal(t, tensors[name]), name
