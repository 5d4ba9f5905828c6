"""Tests of fastrobust.train.muon against the singular value decomposition, torch's Muon and torch's SGD."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrobust.train.learner import Learner
from fastrobust.train.muon import Muon, orthogonal

RATES = torch.tensor([0.01, 0.03, 0.02, 0.01])


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_orthogonal_keeps_directions_and_evens_their_sizes(shape):
    """In the bases of the matrix's own decomposition what comes out is diagonal, with numbers near 1."""
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonal(matrix[None])[0] @ v.T
    assert s.max() > 1.9 * s.min()
    assert (found - torch.diag(found.diag())).abs().max() < 1e-9
    assert found.diag().min() > 0.65 and found.diag().max() < 1.25


def test_sizes_from_a_five_hundredth_of_all_on_become_about_one():
    for size in torch.logspace(-2.69, 0, 200, dtype=torch.float64).tolist():
        rest = (1 - size**2) ** 0.5  # both together have the length 1
        found = orthogonal(torch.diag(torch.tensor([size, rest], dtype=torch.float64))[None])[0].diag()
        assert found[0] > 0.68 and found[0] < 1.21


def network():
    torch.manual_seed(1)
    layers = []
    for inputs, outputs, padding in ((3, 12, 1), (12, 12, 1), (12, 12, 1), (12, 5, 0)):  # two of one shape
        layers += [nn.Conv2d(inputs, outputs, 3, padding=padding, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(5 * 6 * 6, 4))


def batches(count=4):
    generator = torch.Generator().manual_seed(2)
    return [(torch.rand(6, 3, 8, 8, generator=generator), torch.arange(6) % 4) for _ in range(count)]


def test_a_training_is_torchs_muon_and_sgd():
    """torch's Muon takes matrices and computes in bfloat16: convolutions agree to 3 % of what they moved, the others exactly
    as far as these let them. Lengths are kept by hand."""
    mine, plain = network(), network()
    learner = Learner(mine, Muon(name="muon", momentum=0.7, others=3.0, weight_decay=1e-3), RATES)
    convolutions = [m for m in plain if isinstance(m, nn.Conv2d)]
    flat = [nn.Parameter(m.weight.detach().flatten(1).clone()) for m in convolutions]
    others = [p for p in plain.parameters() if p.dim() != 4]
    # at rate r torch's steps are r x sqrt(max(1, rows / columns)), here r
    muon = torch.optim.Muon(flat, lr=1.0, weight_decay=0.0, momentum=0.7, adjust_lr_fn="original")
    sgd = torch.optim.SGD(others, lr=1.0, momentum=0.9, weight_decay=1e-3)
    for rate, (x, y) in zip(RATES.tolist(), batches(), strict=True):
        learner.update(x, y)
        before = [p.detach().clone() for p in flat]
        gradients = torch.autograd.grad(F.cross_entropy(plain(x), y), [*(m.weight for m in convolutions), *others])
        for p, g in zip([*flat, *others], gradients, strict=True):
            p.grad = g.flatten(1) if p.shape != g.shape else g
        muon.param_groups[0]["lr"], sgd.param_groups[0]["lr"] = rate, 3 * rate
        muon.step(), sgd.step()
        with torch.no_grad():
            for m, p, old in zip(convolutions, flat, before, strict=True):
                p += old * (len(old) ** 0.5 / old.norm() - 1)  # torch's step leaves the length alone
                m.weight.copy_(p.view_as(m.weight))
    start = dict(network().named_parameters())
    for (name, p), q in zip(mine.named_parameters(), plain.parameters(), strict=True):
        moved = (q - start[name]).norm()
        assert moved > 0.01 and (p - q).norm() < 0.03 * moved, name
        if p.dim() == 4:
            assert p.norm().item() == pytest.approx(len(p) ** 0.5, rel=0.03)


def test_what_is_kept_is_all_that_a_step_needs():
    learner, other = (Learner(network(), Muon(name="muon"), RATES) for _ in range(2))
    for x, y in batches()[:2]:
        learner.update(x, y)
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    for x, y in batches()[2:]:
        learner.update(x, y)
        other.update(x, y)
    assert all(torch.equal(t, other.tensors()[name]) for name, t in learner.tensors().items())


def test_a_scaler_divides_gradients_and_stops_a_step_that_is_not_finite():
    model = network()
    optimizer = Muon(name="muon").build(model, torch.tensor(0.01))
    twin = copy.deepcopy(model)
    plain = Muon(name="muon").build(twin, torch.tensor(0.01))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = torch.randn_like(q)
        p.grad = 1024 * q.grad
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(1.0)
    next(model.parameters()).grad.fill_(torch.inf)
    optimizer.step()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(not optimizer.state[p]["momentum_buffer"].any() for p in model.parameters())
    next(model.parameters()).grad.copy_(1024 * next(twin.parameters()).grad)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(optimizer.state[p]["momentum_buffer"], plain.state[q]["momentum_buffer"])
