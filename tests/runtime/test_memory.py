"""Tests of fastrobust.runtime.memory. Lack of memory is made up here, except for the CPU allocator's; `make stress` has it
for real."""

from __future__ import annotations

import gc
import os
import weakref

import pytest
import torch

from fastrobust.__main__ import main as cli
from fastrobust.attack import gradient, pgd, verdicts
from fastrobust.data import sets
from fastrobust.evaluation.accuracy import evaluate
from fastrobust.models import create
from fastrobust.runtime import memory
from fastrobust.runtime.command import main_with_errors
from fastrobust.runtime.errors import FastrobustError, is_out_of_memory

IMAGES, LABELS = torch.zeros(100, 3, 4, 4), torch.zeros(100, dtype=torch.int64)


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize("fits, found", [(100, 50), (50, 50), (49, 25), (5, 3), (0, 0)])
def test_the_largest_batch_of_the_halves_that_fits(fits, found):
    def step(images, labels):
        assert len(images) == len(labels)
        if len(images) > fits:
            out_of_memory()

    assert memory.largest_that_fits(step, IMAGES, LABELS) == found


def test_what_a_pass_keeps_is_counted():
    """By hand, for 2 images: the convolution keeps its input, ReLU its output, and the last layer sees that same output."""
    flat = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(180, 2))
    assert memory.of_a_pass(flat, torch.zeros(2, 3, 8, 8)) == 4 * 2 * (3 * 8 * 8 + 5 * 6 * 6)
    for parameter in flat.parameters():
        parameter.requires_grad_(False)
    assert memory.of_a_pass(flat, torch.zeros(2, 3, 8, 8)) == 0


@pytest.mark.parametrize(("looks", "length", "kept"), [(False, 2**30, 2 * 4 * 2**30), (True, 2, 4 + 4 * 2)])
def test_counting_takes_no_memory_where_shapes_are_enough(looks, length, kept):
    """The pass would take 8 GB, for which the system might kill the process."""
    seen = []

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            seen.append(x.device.type)
            return (x * self.weight if not looks or x.max() == 0 else x).relu()

    assert memory.of_a_pass(Network(), torch.zeros(1).expand(length)) == kept
    assert seen == (["meta", "cpu"] if looks else ["meta"])


@pytest.mark.parametrize(
    ("needed", "told", "calls"),
    [
        (0, {}, [(-4, 0), (-1, -1)]),
        (250, {}, [(-4, 0), (-1, -1)]),
        (251, {}, []),  # four times as much is not there
        (0, {"MALLOC_ARENA_MAX": "1"}, []),
        (0, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, []),
    ],
)
def test_freed_memory_is_kept_where_there_is_plenty_and_nobody_says_otherwise(monkeypatch, needed, told, calls):
    """By mallopt: no block comes straight from the system (M_MMAP_MAX), and nothing is given back (M_TRIM_THRESHOLD)."""
    found = []

    class Libc:
        def mallopt(self, option, value):
            found.append((option, value))

    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Libc())
    monkeypatch.setattr("fastrobust.runtime.limits.available_memory", lambda: 1000)
    memory.keep_freed(needed)
    assert found == calls
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())  # another libc
    memory.keep_freed(needed)
    assert found == calls


def test_training_and_evaluation_on_a_cpu_say_what_they_need(quick, monkeypatch, tmp_path, capsys):
    """mnist_net keeps so many bytes an image: 35 of a batch in training, 60 in evaluation."""
    each, found = 4 * (3 * 28**2 + 16 * 14**2 + 32 * 7**2 + 100), []
    monkeypatch.setattr(memory, "keep_freed", found.append)
    assert cli(["train", str(quick()), "loader=torch", "evaluation.limit=10"]) == 0
    assert found == [35 * each]
    asked = ["--attack", "pgd-1-1", "--limit", "10", "--batch-size", "60"]
    assert cli(["evaluate", str(tmp_path / "runs" / "bars"), *asked]) == 0
    assert found == [35 * each, 60 * each]


def test_a_run_that_the_system_would_kill_is_warned_of(quick, monkeypatch, capsys):
    """mnist_net keeps so many bytes an image, times the 35 images of a batch: 1 MB."""
    needed = 35 * 4 * (3 * 28**2 + 16 * 14**2 + 32 * 7**2 + 100)
    for free, words in ((needed, ""), (needed - 1, "phases.0.batch_size=17 needs less"), (50_000, "use a smaller model")):
        monkeypatch.setattr("fastrobust.runtime.limits.available_memory", lambda free=free: free)
        assert cli(["train", str(quick()), "loader=torch", "evaluation.limit=10", f"name=free{free}"]) == 0
        found = capsys.readouterr().err
        assert words in found and ("a step on 35 images needs at least" in found) == bool(words)


def test_the_words_of_the_cpu_allocator_are_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("could not create a primitive"))  # oneDNN: no memory for a kernel's code
    unsupported = "could not create a primitive descriptor for the matmul primitive. Run workload with environment variable"
    assert not is_out_of_memory(RuntimeError(unsupported))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_the_reason_is_given_where_nothing_fits():
    """So that what is no lack of memory after all can be seen."""

    def fails(*batch):
        raise RuntimeError("could not create a primitive")

    with (
        pytest.raises(FastrobustError, match=r"not even 1 fits \(could not create a primitive\): use a smaller model"),
        memory.explained("a run", "batch_size", fails, IMAGES, LABELS),
    ):
        fails()


def test_the_tensors_of_what_failed_are_gone_when_smaller_batches_are_tried():
    """Else they would fill the memory that the trial needs."""
    held = []

    def fails():
        large = torch.zeros(1000)
        held.append(weakref.ref(large))
        out_of_memory()

    def step(images, labels):
        gc.collect()
        assert held[0]() is None

    message = "a run: out of memory on cpu with 100 images at once; 50 was tried and fits: set batch_size=50"
    with (
        pytest.raises(FastrobustError, match=message),
        memory.explained("a run", "batch_size", step, IMAGES, LABELS),
    ):
        fails()


def test_an_evaluation_names_a_batch_size_that_fits(monkeypatch):
    images = torch.randint(0, 256, (40, 3, 28, 28), dtype=torch.uint8)
    data = sets.ImageSet(images, torch.arange(40) % 10, tuple("0123456789"), "made up")
    model = create("mnist_net", channels=3, classes=10, mean=(0.0,) * 3, std=(1.0,) * 3)
    step = gradient.step

    def hungry(model, x, *rest):
        return out_of_memory() if len(x) > 6 else step(model, x, *rest)

    monkeypatch.setattr(gradient, "step", hungry)
    for module in (verdicts, pgd):  # so that all are attacked, to the end
        monkeypatch.setattr(module, "correct", lambda logits, y: torch.ones(len(y), dtype=torch.bool))
    settings = {"epsilon": 0.1, "alpha": 0.05, "steps": 2, "restarts": 1}
    with pytest.raises(FastrobustError, match=r"with 24 images at once; 6 was tried and fits: set evaluation\.batch_size=6"):
        evaluate(model, data, batch_size=24, **settings)
    assert evaluate(model, data, batch_size=6, **settings)["examples"] == 40


def test_any_other_lack_of_memory_is_one_line(capsys):
    assert main_with_errors(out_of_memory) == 2
    assert capsys.readouterr().err == "error: out of memory: CUDA out of memory. Tried to allocate 20.00 GiB\n"
