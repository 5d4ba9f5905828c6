"""Tests of fastrobust.train.optimizers: against torch's plain ones, and momentum against floats worked out by hand."""

import pytest
import torch
from small_learner import RATES, adam, make_batches, make_model, plain_training, same_weights, sgd
from torch import Tensor, nn

from fastrobust.train.learner import Learner


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_sgd_is_torchs_sgd(momentum, weight_decay):
    model, reference = make_model(), make_model()
    batches = make_batches(len(RATES))
    learner = Learner(model, sgd(momentum=momentum, weight_decay=weight_decay), torch.tensor(RATES))
    for x, y in batches:
        learner.update(x, y)
    plain = torch.optim.SGD(
        reference.parameters(), lr=1.0, momentum=momentum, weight_decay=weight_decay, foreach=False, fused=False
    )
    plain_training(reference, plain, batches, RATES)
    same_weights(model, reference)
    assert max((p - q).abs().max() for p, q in zip(model.parameters(), make_model().parameters(), strict=True)) > 0.05


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_adam_is_torchs_adam(weight_decay):
    rates = [lr / 20 for lr in RATES]
    model, reference = make_model(), make_model()
    model[0].bias, reference[0].bias = None, None  # before BatchNorm its gradient is rounding, which Adam would amplify
    batches = make_batches(len(rates))
    learner = Learner(model, adam(weight_decay=weight_decay), torch.tensor(rates))
    for x, y in batches:
        learner.update(x, y)
    plain = torch.optim.Adam(reference.parameters(), lr=1.0, weight_decay=weight_decay, foreach=False, fused=False)
    plain_training(reference, plain, batches, rates)
    same_weights(model, reference, atol=1e-5)


def test_every_update_has_its_learning_rate_and_momentum_never_moves():
    """Trap 1. One weight w with gradient 1 per update: plain SGD with momentum, in Python floats."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            """A loss of log(1 + exp(w - 30)) + 30 - w, whose gradient is -1 for w far below 30."""
            return torch.stack([self.w.expand(len(x)), torch.full((len(x),), 30.0)], 1)

    model = One()
    learner = Learner(model, sgd(momentum=0.9, weight_decay=0.0), torch.tensor(RATES))
    x, y = torch.zeros(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64)
    w = velocity = 0.0
    for k, lr in enumerate(RATES):
        learner.update(x, y)
        velocity = 0.9 * velocity - 1.0
        w -= lr * velocity
        assert model.w.item() == pytest.approx(w, rel=1e-5)
        assert learner.lr.item() == pytest.approx(lr) and learner.updates.item() == k + 1
        assert [group["momentum"] for group in learner.optimizer.param_groups] == [0.9]


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("decay_batchnorm", [True, False])
def test_who_is_decayed(make, decay_batchnorm):
    """With a loss that depends on no weight, only weight decay moves them."""

    class Indifferent(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * super().forward(x)

    model = Indifferent(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.BatchNorm1d(32), nn.Linear(32, 4))
    for p in model.parameters():
        nn.init.ones_(p)
    learner = Learner(model, make(weight_decay=0.5, decay_batchnorm=decay_batchnorm), torch.tensor([0.1]))
    learner.update(*make_batches(1)[0])
    spared = {name for name, p in model.named_parameters() if torch.equal(p, torch.ones_like(p))}
    assert spared == (set() if decay_batchnorm else {"1.weight", "1.bias", "3.weight", "3.bias"})
    decayed = 0.95 if make is sgd else 0.9  # 1 - lr * decay; Adam's first step is lr whatever the gradient
    torch.testing.assert_close(model[0].weight, torch.full_like(model[0].weight, decayed))


@pytest.mark.parametrize("decay_batchnorm", [True, False])
def test_training_without_decay_of_batchnorm(decay_batchnorm):
    model, reference = make_model(), make_model()
    batches = make_batches(len(RATES))
    learner = Learner(model, sgd(weight_decay=0.3, decay_batchnorm=decay_batchnorm), torch.tensor(RATES))
    for x, y in batches:
        learner.update(x, y)
    norm = [reference[1].weight, reference[1].bias]
    rest = [reference[0].weight, reference[0].bias, reference[4].weight, reference[4].bias]
    groups = [{"params": rest, "weight_decay": 0.3}, {"params": norm, "weight_decay": 0.3 if decay_batchnorm else 0.0}]
    plain_training(reference, torch.optim.SGD(groups, lr=1.0, momentum=0.9, foreach=False, fused=False), batches, RATES)
    same_weights(model, reference)
