"""Tests of fastrobust.train.shadow: half-precision weights with fp32 masters, against torch's autocast, SGD and GradScaler.
By torch's own operations everywhere, by the kernels where Triton is."""

import math

import pytest
import torch
from small_learner import RATES, make_batches, make_model, sgd
from torch import nn
from training_runs import on_noise, run_steps, same
from triton_kernels import DEVICE, needs_kernels

from fastrobust.models import fused
from fastrobust.train import engine, shadow
from fastrobust.train.learner import Learner

WAYS = [pytest.param("torch"), pytest.param("kernels", marks=needs_kernels)]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    if request.param == "torch":
        for module in (fused, shadow):
            monkeypatch.setattr(module, "have_kernels", lambda device: False)
    return request.param


def made(seed: int, optimizer, precision: str = "fp16", kernels: bool = True) -> Learner:
    """A learner whose convolution is in channels-last memory."""
    model = make_model(seed).to(DEVICE, memory_format=torch.channels_last)
    return Learner(model, optimizer, torch.tensor(RATES), precision=precision, kernels=kernels)


def batches(count: int) -> list:
    return [(x.to(DEVICE), y.to(DEVICE)) for x, y in make_batches(count)]


def overflow(learner: Learner, x, y) -> None:
    """An update whose gradients are infinite in half precision."""
    hook = learner.model[3].register_forward_hook(
        lambda module, inputs, out: out.register_hook(lambda g: g * torch.inf) and None
    )
    learner.update(x, y)
    hook.remove()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("optimizer", [sgd(), sgd(momentum=0.0), sgd(weight_decay=0.1, decay_batchnorm=False)], ids=str)
def test_updates_are_those_of_torch(way, optimizer, precision):
    """Weights, momentum, running averages, losses and loss scale after eight updates, two of which overflow in fp16 and one
    of which raises the scale: to the last digits of fp32, for the passes are the same."""
    if precision == "bf16" and way == "kernels" and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter cuts bf16 instead of rounding it")
    plain, mine = (made(0, optimizer, precision, kernels) for kernels in (False, True))
    assert mine.shadow is not None and mine.shadow.kernels == (way == "kernels") and plain.shadow is None
    for learner in (plain, mine):
        learner.scaler.set_growth_interval(3)
        scales = []
        for k, (x, y) in enumerate(batches(8)):
            if precision == "fp16" and k in (1, 2):
                before = learner.state_dict()["tensors"]
                overflow(learner, x, y)
                after = learner.state_dict()["tensors"]
                trained = [name for name in before if "weight" in name or "bias" in name or name.startswith("optimizer")]
                assert trained and all(torch.equal(before[name], after[name]) for name in trained)
            else:
                learner.update(x, y)
            scales.append(learner.scaler.get_scale())
        assert precision != "fp16" or scales == [65536.0, 32768.0, 16384.0, 16384.0, 16384.0, 32768.0, 32768.0, 32768.0]
    one, other = plain.state_dict(), mine.state_dict()
    assert one["scaler"] == other["scaler"] and one["tensors"].keys() == other["tensors"].keys()
    for name, value in one["tensors"].items():
        torch.testing.assert_close(other["tensors"][name], value, rtol=2e-3, atol=1e-5, msg=name)
        assert other["tensors"][name].dtype == value.dtype and other["tensors"][name].stride() == value.stride()


def test_one_update_is_torchs_to_the_last_digits(way):
    """From the same gradients: nothing but the rounding of a product and a sum."""
    plain, mine = (made(0, sgd(weight_decay=0.1), "fp16", kernels) for kernels in (False, True))
    x, y = batches(1)[0]
    for learner in (plain, mine):
        learner.update(x, y)
    for name, value in plain.state_dict()["tensors"].items():
        torch.testing.assert_close(mine.state_dict()["tensors"][name], value, rtol=3e-7, atol=1e-9, msg=name)


def test_passes_see_the_weights_that_autocast_would_cast(way):
    plain, mine = made(0, sgd(), "fp16", False), made(0, sgd())
    x, y = batches(1)[0]
    seen = {}
    mine.model[4].register_forward_hook(lambda module, inputs, out: seen.update(weight=module.weight.dtype, out=out.dtype))
    found, expected = (learner.input_gradient(x, y) for learner in (mine, plain))
    assert seen == {"weight": torch.float16, "out": torch.float16}
    assert torch.allclose(found[0], expected[0], rtol=2e-3, atol=1e-2) and torch.equal(found[1], expected[1])
    assert mine.model[4].weight.dtype == torch.float32 and all(p.requires_grad for p in mine.shadow.halves)
    assert all(p.grad is None for p in mine.model.parameters()), "the attack leaves no gradient behind"
    assert torch.equal(mine.shadow.names["4.weight"], mine.model[4].weight.half())


def test_a_replay_of_free_has_the_input_gradient_too(way):
    plain, mine = made(0, sgd(), "fp16", False), made(0, sgd())
    x, y = batches(1)[0]
    expected, found = plain.update_with_input_gradient(x, y), mine.update_with_input_gradient(x, y)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-2)
    assert found.abs().max() > 1


@pytest.mark.parametrize("optimizer", [sgd(), sgd(momentum=0.0)], ids=str)
def test_a_stored_state_goes_on_bit_by_bit(way, optimizer):
    first = made(0, optimizer)
    for x, y in batches(3):
        first.update(x, y)
    overflow(first, *batches(4)[3])
    stored = first.state_dict()
    second = made(1, optimizer)
    second.load_state_dict(stored)
    for x, y in batches(7)[4:]:
        first.update(x, y)
        second.update(x, y)
    one, other = first.state_dict(), second.state_dict()
    assert same(one["tensors"], other["tensors"]) and one["scaler"] == other["scaler"]
    assert not torch.equal(one["tensors"]["model.4.weight"], stored["tensors"]["model.4.weight"])


@pytest.mark.parametrize("kind", ["no BatchNorm", "nothing to cast"])
def test_a_model_may_have_weights_of_one_kind_alone(way, kind):
    if kind == "no BatchNorm":
        network, shape = (lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 4))), (8, 1, 6, 6)
    else:
        network, shape = (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())), (8, 4, 6, 6)
    x, y, found = torch.rand(shape, device=DEVICE), torch.arange(8, device=DEVICE) % 4, []
    for kernels in (False, True):
        torch.manual_seed(0)
        model = network().to(DEVICE)
        learner = Learner(model, sgd(), torch.tensor(RATES), precision="fp16", kernels=kernels)
        for _ in range(3):
            learner.update(x, y)
        found.append(learner.state_dict()["tensors"])
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=2e-3, atol=1e-5, msg=name)


def test_a_state_of_autocast_goes_on_with_a_shadow():
    """A run may change its engine: names, shapes and kinds are the same, and the half weights follow."""
    first, second = made(0, sgd(), "fp16", False), made(1, sgd())
    first.update(*batches(1)[0])
    second.load_state_dict(first.state_dict())
    assert same(first.state_dict()["tensors"], second.state_dict()["tensors"])
    assert torch.equal(second.shadow.names["4.weight"], first.model[4].weight.half())


def test_a_weight_without_a_gradient_is_refused_and_frozen_ones_stay():
    model = make_model()
    model[4].weight.requires_grad_(False)
    before = model[4].weight.clone()
    learner = Learner(model, sgd(), torch.tensor(RATES), precision="bf16", kernels=True)
    learner.update(*make_batches(1)[0])
    assert torch.equal(model[4].weight, before) and not torch.equal(model[4].bias, make_model()[4].bias)
    model = nn.Sequential(*make_model())
    model.unused = nn.Linear(3, 3)
    model.forward = lambda x: model[4](model[3](model[2](model[1](model[0](x)))))
    learner = Learner(model, sgd(), torch.tensor(RATES), precision="bf16", kernels=True)
    with pytest.raises(Exception, match="take part in the loss"):
        learner.update(*make_batches(1)[0])


@pytest.mark.parametrize("method", ["fgsm", "free", "fgsm-ibp"])
def test_a_fused_step_gives_the_numbers_of_an_eager_one(method, monkeypatch, capsys):
    """Losses of some steps within 1 %, of every method that uses the learner in a way of its own. By torch's operations: the
    interpreter would need minutes."""
    monkeypatch.setattr(engine, "trouble", lambda device: "made up")
    for module in (fused, shadow):
        monkeypatch.setattr(module, "have_kernels", lambda device: False)
    eager, mine = (run_steps(on_noise(method, "bf16", engine=name), 4) for name in ("eager", "fused"))
    assert mine.rates == eager.rates and mine.tensors.keys() == eager.tensors.keys()
    assert mine.losses == pytest.approx(eager.losses, rel=1e-2)
    assert not math.isnan(sum(mine.losses))
    assert capsys.readouterr().err.count("warning: engine fused goes on without kernels of its own: made up") == 1


def test_processes_exchange_the_gradients_of_the_fp32_weights(tmp_path):
    """DistributedDataParallel watches the model's own parameters: with a shadow they would get no gradient."""
    plain, mine = (made(0, sgd(), "bf16", kernels) for kernels in (False, True))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mine.share_gradients()
        for x, y in batches(3):
            for learner in (plain, mine):
                learner.input_gradient(x, y)
                learner.update(x, y)
    finally:
        torch.distributed.destroy_process_group()
    assert same(mine.state_dict()["tensors"], plain.state_dict()["tensors"])
