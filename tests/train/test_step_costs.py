"""What a step may cost, seen without a GPU: it runs on fake tensors, which have shapes and no numbers. A step that asks for
a number (`.item()`, `nonzero`, `if tensor:`) would make a GPU wait for the host, and cannot be captured: here it fails.
How many operators a step calls and how many bytes they read and write has a ceiling, which may only be lowered."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_runs import STEP_METHODS, STEP_OPTIONS, Noise, few_stages, on_noise

from fastrobust.attack.pgd import StaticAttack
from fastrobust.attack.threat import Threat
from fastrobust.attack.verdicts import evaluating
from fastrobust.data.batch import Batch

# of a step on 16 images of 8 x 8 pixels (`fgsm-ibp`: 28 x 28), by method and precision: operators, MB
CEILINGS = {
    "standard": {"fp32": (439, 18.2), "bf16": (529, 10.9), "fp16": (549, 11.1)},
    "fgsm": {"fp32": (730, 35.6), "bf16": (856, 20.6), "fp16": (876, 20.8)},
    "fgsm-previous": {"fp32": (727, 35.5), "bf16": (853, 20.5), "fp16": (873, 20.7)},
    "fgsm-ibp": {"fp32": (827, 110.5), "bf16": (911, 104.8), "fp16": (931, 105.5)},
    "n_fgsm": {"fp32": (729, 35.6), "bf16": (855, 20.6), "fp16": (875, 20.8)},
    "pgd": {"fp32": (1028, 52.8), "bf16": (1190, 30.1), "fp16": (1210, 30.3)},
    "free": {"fp32": (900, 37.5), "bf16": (1092, 23.0), "fp16": (1132, 23.4)},
    "fgsm_uap": {"fp32": (847, 35.6), "bf16": (973, 20.6), "fp16": (993, 20.8)},
    "class_uap": {"fp32": (1132, 47.6), "bf16": (1325, 27.9), "fp16": (1345, 28.1)},
    "liet": {"fp32": (1541, 52.1), "bf16": (1770, 30.6), "fp16": (1790, 30.7)},
    "fgsm_pgi": {"fp32": (1160, 48.0), "bf16": (1353, 28.4), "fp16": (1373, 28.5)},
    "trades": {"fp32": (1489, 74.9), "bf16": (1778, 43.3), "fp16": (1798, 43.5)},
    "n_aaer": {"fp32": (842, 35.6), "bf16": (968, 20.6), "fp16": (988, 20.8)},
    "rs_cs": {"fp32": (1148, 47.2), "bf16": (1341, 27.6), "fp16": (1361, 27.7)},
    "gradalign": {"fp32": (2588, 120.1), "bf16": (2866, 68.1), "fp16": (2886, 68.3)},
    "sora": {"fp32": (762, 36.0), "bf16": (894, 21.0), "fp16": (914, 21.2)},
    "awp": {"fp32": (1662, 67.7), "bf16": (1985, 41.4), "fp16": (2005, 41.6)},
}


SLACK = 1.05  # torch's versions differ by a little; a ceiling further above what is found must be lowered
VIEWS = {
    "alias", "as_strided", "detach", "empty", "empty_like", "expand", "new_empty", "permute", "select", "slice", "squeeze",
    "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "split", "split_with_sizes",
    "new_empty_strided", "empty_strided", "is_pinned", "lift_fresh",
}  # fmt: skip


class Count(TorchDispatchMode):
    """Operators that do work, and the bytes of the tensors that they read and write."""

    def __init__(self):
        super().__init__()
        self.operators, self.bytes = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._overloadpacket._qualified_op_name.split("::")[1] not in VIEWS:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.operators += 1
            self.bytes += sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        return out


def on_fakes(noise: Noise, take) -> Count:
    """`take(batch)` on a batch without numbers: what it costs. What the step keeps is not changed, or is fake as well."""
    batch = next(noise.batches(1))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, Count() as count, contextlib.ExitStack() as stack:
        for name in ("cpu", "numpy", "tolist"):
            stack.enter_context(mock.patch.object(torch.Tensor, name, side_effect=RuntimeError(f"a step calls {name}()")))
        take(Batch(*(mode.from_tensor(t) for t in batch)))
    return count


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", STEP_METHODS)
def test_a_step_waits_for_nothing_and_costs_no_more(method, precision):
    """An ordinary step: at one of eight the alignment of the attack's gradients comes on top."""
    noise = on_noise(method, precision, network=few_stages(method))
    noise.step.learner.looks = False
    count = on_fakes(noise, noise.step.take)
    found = count.operators, round(count.bytes / 1e6, 1)
    for what, value, ceiling in zip(("operators", "MB"), found, CEILINGS[method][precision], strict=True):
        assert value <= 1.01 * ceiling, f"the step has grown to {value} {what}"
        assert ceiling <= SLACK * value, f"well done: lower the ceiling to {value} {what}"


def test_a_step_that_notes_the_alignment_waits_for_nothing_either():
    counts = []
    for looks in (False, True):
        noise = on_noise("fgsm", network=few_stages("fgsm"))
        noise.step.learner.looks = looks
        counts.append(on_fakes(noise, noise.step.take))
    assert 10 < counts[1].operators - counts[0].operators < 40 and counts[1].bytes < 1.03 * counts[0].bytes


@pytest.mark.parametrize("option", STEP_OPTIONS)
def test_options_wait_for_nothing(option):
    noise = on_noise(more=STEP_OPTIONS[option], network=few_stages("fgsm"))
    assert on_fakes(noise, noise.step.take).operators > CEILINGS["fgsm"]["fp32"][0] / SLACK


def test_an_attack_step_waits_for_nothing():
    noise = on_noise("standard")
    model, images = noise.step.learner.model, next(noise.batches(1)).images
    static = StaticAttack(model, images.float() / 255, Threat(0.03), 0.01)
    with evaluating(model):
        assert on_fakes(noise, lambda batch: static.run()).operators > 100


@pytest.mark.parametrize(
    "question",
    [
        lambda learner: learner.correct.item(),
        lambda learner: learner.lr_table.nonzero(),
        lambda learner: learner.lr_table[learner.lr_table > 0],
        lambda learner: 1 if learner.loss_sum > 0 else 0,
        lambda learner: float(learner.lr),
        lambda learner: learner.updates.tolist(),
    ],
    ids=["item", "nonzero", "mask", "if", "float", "tolist"],
)
def test_a_step_that_waits_is_found(question):
    noise = on_noise(side=28)

    def take(batch):
        noise.step.take(batch)
        question(noise.step.learner)

    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException, RuntimeError), match=r"aten|calls"):
        on_fakes(noise, take)
