"""Tests of fastrobust.train.learner: mixed precision against constructions where an unscaled loss fails, BatchNorm
statistics against averages made by hand, and stored states against going on."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_learner import RATES, adam, make_batches, make_model, same_weights, sgd
from torch import Tensor, nn

from fastrobust.attack.gradient import frozen
from fastrobust.train.learner import Learner


def test_frozen_weights_are_not_trained():
    model = make_model()
    model[4].weight.requires_grad_(False)
    before = model[4].weight.clone()
    learner = Learner(model, sgd(), torch.tensor(RATES))
    learner.update(*make_batches(1)[0])
    assert torch.equal(model[4].weight, before)
    assert not torch.equal(model[4].bias, make_model()[4].bias)


def test_update_with_input_gradient_is_both():
    model, reference = make_model(), make_model()
    x, y = make_batches(1)[0]
    found = Learner(model, sgd(), torch.tensor(RATES)).update_with_input_gradient(x, y)
    leaf = x.clone().requires_grad_()
    F.cross_entropy(reference(leaf), y).backward()
    torch.testing.assert_close(found, leaf.grad)
    other = make_model()
    Learner(other, sgd(), torch.tensor(RATES)).update(x, y)
    same_weights(model, other)
    assert not x.requires_grad and x.grad is None


def test_input_gradient_tells_who_is_classified_correctly():
    model = make_model()
    x, y = make_batches(1, n=64)[0]
    _, correct = Learner(model, sgd(), torch.tensor(RATES)).input_gradient(x, y)
    assert correct.dtype == torch.bool
    expected = [row.index(max(row)) == label for row, label in zip(model(x).tolist(), y.tolist(), strict=True)]
    assert correct.tolist() == expected
    assert 0 < correct.sum() < 64


def test_frozen_gives_back_what_it_took():
    model = make_model()
    model[0].weight.requires_grad_(False)
    with pytest.raises(ZeroDivisionError), frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        raise ZeroDivisionError
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]


# ---- precision


class Confident(nn.Module):
    """logits = 20 W x with entries of W of 1 or -1: on its own class W[k] an example's other probabilities are tiny."""

    def __init__(self, scale: float = 20.0):
        super().__init__()
        self.linear = nn.Linear(8, 2, bias=False)
        rows = torch.tensor([[1.0, 1, 1, 1, -1, -1, -1, -1], [-1.0, -1, -1, -1, 1, 1, 1, 1]])
        self.linear.weight = nn.Parameter(rows)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear(x.flatten(1))


def confident_batch() -> tuple[Tensor, Tensor]:
    """Margin between the logits: 20 * 2 * (0.75 - 0.25) = 20, so a wrong class has probability exp(-20) = 2e-9."""
    generator = torch.Generator().manual_seed(2)
    y = torch.randint(2, (16,), generator=generator)
    x = torch.full((16, 8), 0.4375)
    for row, label in zip(x, y, strict=True):
        row[4 * label : 4 * label + 4] += 0.125
    return x.view(16, 1, 2, 4), y


def test_fp16_input_gradients_of_confident_examples_survive():
    """Trap 7: without a loss scale every one of these gradients is zero in fp16."""
    model = Confident()
    x, y = confident_batch()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.float16):
        logits = model(leaf).float()
    F.cross_entropy(logits, y).backward()
    assert (leaf.grad == 0).all()

    exact = x.double().requires_grad_()  # the closed form of a linear model, in fp64
    weight = model.linear.weight.double().detach()
    probabilities = (20 * exact.flatten(1) @ weight.T).softmax(1)
    gradient = 20 * ((probabilities - F.one_hot(y, 2)) @ weight).view_as(x)
    assert 0 < gradient.abs().max() < 1e-6

    for precision in ("fp16", "bf16", "fp32"):
        found, correct = Learner(Confident(), sgd(), torch.tensor(RATES), precision=precision).input_gradient(x, y)
        assert torch.equal(found.sign(), gradient.sign().float()), precision
        assert correct.all()


def test_fp16_replays_of_free_are_scaled_too():
    x, y = confident_batch()
    found = Learner(Confident(), sgd(), torch.tensor(RATES), precision="fp16").update_with_input_gradient(x, y)
    right, wrong = found.flatten(1)[:, :4], found.flatten(1)[:, 4:]
    towards = torch.where(y[:, None] == 0, right, wrong)
    assert (towards < 0).all()


def overflowing_batch() -> tuple[Tensor, Tensor]:
    """Both classes alike at pixels of 300: a weight gradient of 65536 * 0.5 * 300 is infinite in fp16."""
    return torch.full((4, 1, 2, 4), 300.0), torch.tensor([0, 0, 0, 0])


@pytest.mark.parametrize("optimizer", [sgd(weight_decay=0.1), adam(weight_decay=0.1)])
def test_fp16_overflow_skips_the_update_and_lowers_the_scale(optimizer):
    x, y = confident_batch()
    model = Confident(scale=1.0)
    learner = Learner(model, optimizer, torch.full((30,), 0.01), precision="fp16")
    learner.update(x, y)
    before, scale = learner.state_dict()["tensors"], learner.scaler.get_scale()
    learner.update(*overflowing_batch())
    after = learner.state_dict()["tensors"]
    assert learner.scaler.get_scale() == scale / 2
    trained = [name for name in before if name.startswith(("model.", "optimizer."))]
    assert trained and all(torch.equal(before[name], after[name]) for name in trained)
    assert after["sums.updates"].item() == 2  # the schedule goes on
    learner.update(x, y)
    assert not torch.equal(learner.state_dict()["tensors"]["model.linear.weight"], after["model.linear.weight"])
    assert all(t.isfinite().all() for t in learner.state_dict()["tensors"].values())


def test_fp16_gradients_are_unscaled_before_the_update():
    """In a well-behaved problem an fp16 update is the fp32 update, to fp16's accuracy; so is weight decay."""
    models = {p: make_model() for p in ("fp32", "fp16")}
    for precision, model in models.items():
        learner = Learner(model, sgd(weight_decay=0.1), torch.tensor(RATES), precision=precision)
        for x, y in make_batches(4):
            learner.update(x, y)
        assert all(p.dtype == torch.float32 for p in model.parameters())
    same_weights(models["fp16"], models["fp32"], atol=5e-3)
    assert (models["fp32"][4].weight - make_model()[4].weight).abs().max() > 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", [sgd(), adam()])
def test_every_precision_trains(precision, optimizer):
    """Which quarter of the image is bright? The loss falls in 20 steps."""
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(4, (64,), generator=generator)
    x = 0.2 * torch.rand(64, 1, 6, 6, generator=generator)
    for image, k in zip(x, y.tolist(), strict=True):
        image[:, 3 * (k // 2) : 3 * (k // 2) + 3, 3 * (k % 2) : 3 * (k % 2) + 3] += 0.7
    learner = Learner(make_model(), optimizer, torch.full((20,), 0.05), precision=precision)
    losses = []
    for _ in range(20):
        learner.reset_sums()
        learner.update(x, y)
        losses.append(learner.read_sums()[0] / 64)
    assert losses[0] > 1.0 and losses[-1] < 0.2
    assert learner.forward(x).dtype == torch.float32


def test_lower_precisions_are_used():
    seen = {}
    for precision in ("fp32", "bf16", "fp16"):
        model = make_model()
        model[4].register_forward_hook(lambda module, inputs, out, p=precision: seen.update({p: out.dtype}))
        learner = Learner(model, sgd(), torch.tensor(RATES), precision=precision)
        learner.input_gradient(*make_batches(1)[0])
    assert seen == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---- BatchNorm in the attack


def norm_learner(batchnorm_in_attack: str) -> Learner:
    model = nn.Sequential(nn.BatchNorm2d(2, momentum=0.1), nn.Flatten(), nn.Dropout(0.0), nn.Linear(8, 3))
    return Learner(model, sgd(), torch.tensor(RATES), batchnorm_in_attack=batchnorm_in_attack)


def test_batchnorm_statistics_move_in_the_passes_that_they_should():
    """`train`: in both passes; `eval`: in the update alone. The running mean by hand: 0.9 old + 0.1 batch mean."""
    torch.manual_seed(4)
    a, b = torch.rand(6, 2, 2, 2), torch.rand(6, 2, 2, 2) + 1
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    mean_a, mean_b = a.mean((0, 2, 3)), b.mean((0, 2, 3))
    for mode, after_attack, after_update, count in [
        ("train", 0.1 * mean_a, 0.09 * mean_a + 0.1 * mean_b, [1, 2]),
        ("eval", torch.zeros(2), 0.1 * mean_b, [0, 1]),
    ]:
        learner = norm_learner(mode)
        norm = learner.model[0]
        learner.input_gradient(a, y)
        torch.testing.assert_close(norm.running_mean, after_attack)
        assert norm.num_batches_tracked.item() == count[0]
        assert all(module.training for module in learner.model.modules())
        learner.update(b, y)
        torch.testing.assert_close(norm.running_mean, after_update)
        assert norm.num_batches_tracked.item() == count[1]
        assert all(module.training for module in learner.model.modules())


def test_attack_gradient_is_that_of_its_mode():
    torch.manual_seed(5)
    x, y = torch.rand(6, 2, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    gradients = {}
    for mode in ("train", "eval"):
        torch.manual_seed(6)
        learner = norm_learner(mode)
        leaf = x.clone().requires_grad_()
        weight, bias = learner.model[3].weight, learner.model[3].bias
        mean, variance = torch.zeros(()), torch.ones(())  # the running averages of a new BatchNorm
        if mode == "train":
            mean, variance = leaf.mean((0, 2, 3), keepdim=True), leaf.var((0, 2, 3), unbiased=False, keepdim=True)
        normal = (leaf - mean) / (variance + 1e-5).sqrt()
        F.cross_entropy(normal.flatten(1) @ weight.T + bias, y).backward()
        found, _ = learner.input_gradient(x, y)
        torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-6)
        gradients[mode] = found
    assert not torch.allclose(gradients["train"], gradients["eval"], atol=1e-3)


# ---- sums and stored states


def test_sums_of_updates():
    model, reference = make_model(), make_model()
    learner = Learner(model, sgd(), torch.tensor(RATES))
    loss = correct = 0
    batches = make_batches(2, n=8) + make_batches(1, n=5)
    for k, (x, y) in enumerate(batches):
        reference.load_state_dict(model.state_dict())
        logits = reference(x).tolist()
        for row, label in zip(logits, y.tolist(), strict=True):
            loss += math.log(sum(math.exp(v - row[label]) for v in row))
            correct += row.index(max(row)) == label
        learner.input_gradient(x, y)  # does not count
        model.load_state_dict(reference.state_dict())
        learner.update_with_input_gradient(x, y) if k == 1 else learner.update(x, y)
    assert learner.read_sums() == (pytest.approx(loss, rel=1e-5), correct, 21)
    learner.reset_sums()
    assert learner.read_sums() == (0.0, 0, 0)
    assert learner.updates.item() == 3


CASES = [
    ("sgd", sgd(), "fp32"),
    ("sgd without momentum", sgd(momentum=0.0), "fp32"),
    ("sgd sparing batchnorm", sgd(decay_batchnorm=False), "fp32"),
    ("adam", adam(weight_decay=0.01), "fp32"),
    ("adam bf16", adam(), "bf16"),
    ("sgd fp16", sgd(), "fp16"),
    ("adam fp16", adam(), "fp16"),
]


@pytest.mark.parametrize(("optimizer", "precision"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_stored_state_goes_on_bit_by_bit(optimizer, precision):
    batches = make_batches(8)
    rates = torch.tensor(RATES) / (20 if optimizer.name == "adam" else 1)
    first = Learner(make_model(0), optimizer, rates, precision=precision)
    for x, y in batches[:3]:
        first.update(x, y)
    if precision == "fp16":  # one overflow, which moves the scale
        hook = first.model[4].weight.register_hook(lambda gradient: gradient * math.inf)
        first.update(*batches[3])
        hook.remove()
    else:
        first.update(*batches[3])
    stored = first.state_dict()
    frozen_copy = {name: t.clone() for name, t in stored["tensors"].items()}
    for x, y in batches[4:]:
        first.update(x, y)
    assert all(torch.equal(t, frozen_copy[name]) for name, t in stored["tensors"].items())  # a copy, not a view

    second = Learner(make_model(1), optimizer, rates, precision=precision)
    weights = [p.data_ptr() for p in second.model.parameters()]
    second.load_state_dict(stored)
    assert [p.data_ptr() for p in second.model.parameters()] == weights  # in place
    assert second.scaler.state_dict() == stored["scaler"]
    if precision == "fp16":
        assert stored["scaler"]["scale"] < 65536 and second.scaler.get_scale() == stored["scaler"]["scale"]
    for x, y in batches[4:]:
        second.update(x, y)
    one, other = first.state_dict(), second.state_dict()
    assert one["tensors"].keys() == other["tensors"].keys()
    for name, t in one["tensors"].items():
        assert torch.equal(t, other["tensors"][name]), name
    assert one["scaler"] == other["scaler"]
    assert second.updates.item() == 8


def test_a_state_holds_all_that_training_changes():
    names = Learner(make_model(), adam(), torch.tensor(RATES)).state_dict()["tensors"].keys()
    model = {f"model.{name}" for name in make_model().state_dict()}
    moments = {f"optimizer.{i}.{name}" for i in range(6) for name in ("exp_avg", "exp_avg_sq", "step")}
    assert names == model | moments | {f"sums.{name}" for name in ("updates", "loss_sum", "correct", "seen", "alignments")}


def test_a_state_that_does_not_fit_is_refused():
    stored = Learner(make_model(), sgd(), torch.tensor(RATES)).state_dict()
    with pytest.raises(KeyError, match="does not fit this model and optimiser"):
        Learner(make_model(), adam(), torch.tensor(RATES)).load_state_dict(stored)
    with pytest.raises(KeyError):
        Learner(make_model()[:4], sgd(), torch.tensor(RATES)).load_state_dict(stored)
    wider = make_model()
    wider[4] = nn.Linear(64, 5)
    with pytest.raises(RuntimeError, match=r"model\.4\.weight has shape \(5, 64\), stored \(4, 64\)"):
        Learner(wider, sgd(), torch.tensor(RATES)).load_state_dict(stored)


def test_shared_gradients_are_not_timed():
    """DistributedDataParallel times its first ten passes and then every hundredth, with events that a capture forbids. A
    graph of the free method with 9 replays is recorded over passes 100 to 108."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        learner = Learner(make_model(), sgd(), torch.tensor(RATES))
        learner.share_gradients()
        batch = make_batches(1)[0]
        timed = lambda: learner.shared._get_ddp_logging_data()["iteration"]
        for _ in range(50):
            learner.update(*batch)
        last = timed()
        for _ in range(160):
            learner.update(*batch)
        assert last <= 11 and timed() == last
    finally:
        torch.distributed.destroy_process_group()
