"""Methods that keep perturbations from step to step (UAP, LIET, PGI): a few steps of each against the same written out from
its paper, with plain `backward` calls, masks and loops. Weights, running averages and states agree to 1e-5."""

import pytest
import torch
from method_steps import section
from slow_methods import CLASSES, EPOCHS, EPSILON, N, Run, Slow, agree, ball, batches, entropy, smooth, uniform
from torch import Tensor

from fastrobust.runtime.errors import ConfigError
from fastrobust.train.methods.base import Shapes
from fastrobust.train.methods.fgsm_pgi import last_of_each

# ---- universal perturbations


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("name", ["fgsm_uap", "class_uap"])
def test_universal_perturbations(name, stop):
    run, alpha = Run(name, stop_gradient=stop), 1.25 * EPSILON
    u = run.first["u"] * alpha
    assert set(run.first["u"].unique().tolist()) == {-1.0, 1.0} and len(u) == (1 if name == "fgsm_uap" else CLASSES)
    m = [torch.zeros(1, 6, 6) for _ in u]
    slow = Slow()
    for x, y, _ in batches(5):
        row = y if name == "class_uap" else torch.zeros_like(y)
        start = (x + ball(torch.stack([u[k] for k in row]))).clamp(0, 1)
        g, at_start = slow.gradient(start, lambda z, y=y: smooth(z, y))
        end = (x + ball(start - x + EPSILON * g.sign())).clamp(0, 1)
        z = slow.model(end)
        at_start = at_start.detach() if stop else at_start
        slow.update(smooth(z, y) + 10 * ((z - at_start) ** 2).sum() / z.numel())
        g = g / g.abs().sum()
        for k in set(row.tolist()):
            m[k] = 0.3 * m[k] + g[row == k].mean(0)
            u[k] = (u[k] + alpha * m[k].sign()).clamp(-alpha, alpha)
    agree(run.steps(5), slow)
    torch.testing.assert_close(run.state["u"] * alpha, u)
    assert not torch.equal(run.state["u"], run.first["u"])


def test_stopping_the_gradient_matters():
    assert not torch.allclose(
        Run("fgsm_uap").steps(1).model[4].weight, Run("fgsm_uap", stop_gradient=True).steps(1).model[4].weight
    )


# ---- LIET


def some_at_random(y: Tensor, amount: float) -> Tensor:
    """Targets: the others share `amount` at random."""
    rows = torch.rand(len(y), CLASSES)
    for row, k in zip(rows, y.tolist(), strict=True):
        row[k] = 0
        row *= amount / row.sum()
        row[k] = 1 - amount
    return rows


@pytest.mark.parametrize(("epsilon", "stop"), [(6 / 255, False), (0.1, False), (0.1, True)], ids=["small", "large", "stop"])
def test_liet(epsilon, stop):
    """Two of the four classes are looked at in every step. The settings depend on epsilon."""
    run, small = Run("liet", epsilon, every=2, stop_gradient=stop), epsilon < 0.05
    radius, (low, high), amount, most = (1, (0.1, 0.5), 0.6, 100) if small else (2, (0, 1), 0.4, 20)
    assert run.method.noisy == (low, high) and Run("liet", epsilon).method.every == (20 if small else 10)
    information, slow = torch.zeros(CLASSES, 1, 6, 6), Slow()
    for step, (x, y, _) in enumerate(batches(4)):
        slow.model.eval()
        looked_at = torch.tensor([0, 1] if step % 2 == 0 else [2, 3])
        random = some_at_random(looked_at, amount)
        g, _ = slow.gradient(torch.full((2, 1, 6, 6), 0.5), lambda z, random=random: entropy(z, random))
        information[looked_at] = epsilon * g.sign()
        slow.model.train()
        share = low + (high - low) * torch.rand(())
        noisy = torch.rand_like(x) < share
        delta = information[y]
        delta[noisy] = uniform(x, radius * epsilon)[noisy]
        start = (x - delta if torch.rand(()) < 0.5 else x + delta).clamp(0, 1)
        random = some_at_random(y, amount)
        g, at_start = slow.gradient(start, lambda z, random=random: entropy(z, random))
        delta = start - x + epsilon * g.sign()
        z = slow.model((x + (ball(delta, epsilon) if small else delta)).clamp(0, 1))
        p, q = (at_start.detach() if stop else at_start).softmax(1), z.softmax(1)
        middle = (p + q) / 2
        divergence = ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2 / N
        weight = most * (int(EPOCHS[step]) + 1) / 4
        slow.update(entropy(z, some_at_random(y, amount)) + weight * divergence)
    agree(run.steps(4), slow)
    torch.testing.assert_close(run.state["information"] * epsilon, information)


def test_liet_looks_at_every_class_once_in_so_many_steps():
    """Five steps for four classes: the fifth looks at none."""
    run, seen = Run("liet", every=5), []
    for batch in batches(5):
        before = run.state["information"].clone()
        run.method.step(run.learner, batch, run.threat, 1.0, run.state)
        seen += [k for k in range(CLASSES) if not torch.equal(before[k], run.state["information"][k])]
    assert seen == [0, 1, 2, 3] and run.state["count"] == 5


# ---- FGSM-PGI


@pytest.mark.parametrize("stop", [False, True])
def test_fgsm_pgi(stop):
    """What is kept is rounded to fp16 here too: delta in units of epsilon, m in units of 1 / pixels of the batch."""
    run, slow = Run("fgsm_pgi", reset=2, consistency=1, stop_gradient=stop), Slow()
    kept, again = {}, 0
    for step, (x, y, index) in enumerate(batches(8)):
        if step and int(EPOCHS[step]) // 2 != int(EPOCHS[step - 1]) // 2:
            kept = {}
        fresh = (torch.rand_like(x) - 0.5).sign() * EPSILON
        delta, m = fresh.clone(), torch.zeros_like(x)
        for i, image in enumerate(index.tolist()):
            if image in kept:
                delta[i], m[i] = (t.float() for t in kept[image])
                delta[i] *= EPSILON
                again += 1
        g, at_start = slow.gradient((x + delta).clamp(0, 1), lambda z, y=y: smooth(z, y))
        m = g / g.abs().sum() * x.numel() + 0.3 * m
        following = torch.clamp(x + ball(delta + EPSILON * m.sign()), 0, 1) - x
        z = slow.model((x + ball(delta + EPSILON * g.sign())).clamp(0, 1))
        at_start = at_start.detach() if stop else at_start
        slow.update(smooth(z, y) + ((z - at_start) ** 2).mean())
        for i, image in enumerate(index.tolist()):
            kept[image] = (following[i] / EPSILON).half(), m[i].half()
    agree(run.steps(8), slow)
    assert again > 15
    for image, (delta, m) in kept.items():
        torch.testing.assert_close(run.state["delta"][image], delta, rtol=0, atol=2e-3)
        torch.testing.assert_close(run.state["m"][image], m, rtol=0, atol=2e-3)
    assert run.state["delta"].dtype == torch.float16 and run.state["round"][list(kept)].unique().tolist() == [1.0]


def test_a_store_that_cannot_fit_is_refused_before_it_is_made():
    shapes = Shapes((N, 3, 224, 224), 1000, 10**8, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"keeps 4 bytes for each pixel .*6.02e\+04 GB"):
        section("fgsm_pgi").state(shapes)


def test_the_last_place_of_each_image():
    assert last_of_each(torch.tensor([7, 3, 7, 5, 3])).tolist() == [2, 4, 2, 3, 4]
