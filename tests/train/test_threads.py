"""Tests of fastrobust.train.threads: trials change nothing but the number of threads."""

import time

import pytest
import torch

from fastrobust.data import loaders
from fastrobust.runtime.distributed import ALONE
from fastrobust.train import step, threads

CPU = torch.device("cpu")


@pytest.fixture
def small(config_of):
    """(a step, its first batches) with two threads; afterwards torch has as many as before."""
    before = torch.get_num_threads()
    config = config_of()
    loader = loaders.Phases(config, CPU).enter(0)
    torch.set_num_threads(2)
    yield step.build(config, loader, CPU), list(loader.batches(0, 0, 20, 0, 3))
    torch.set_num_threads(before)


def clock(monkeypatch, seconds: dict[int, float]):
    """A step takes so long with so many threads, by the clock that trials read."""
    now = [0.0]

    def read() -> float:
        now[0] += seconds[torch.get_num_threads()] / 2
        return now[0]

    monkeypatch.setattr(threads.time, "perf_counter", read)


def free(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.parametrize(
    ("seconds", "now", "chosen"),
    [
        ({2: 0.02, 1: 0.01}, 2, 1),
        ({2: 0.01, 1: 0.02}, 2, 2),
        ({2: 0.010, 1: 0.009}, 2, 2),
        ({2: 0.010, 1: 0.008}, 2, 1),
        ({2: 0.010, 1: 0.009}, 1, 1),  # not back to more that take longer
        ({2: 0.009, 1: 0.010}, 1, 1),
        ({2: 0.008, 1: 0.010}, 1, 2),
    ],
)
def test_what_is_chosen(small, monkeypatch, seconds, now, chosen):
    made, (batch, *_) = small
    clock(monkeypatch, seconds)
    assert threads.fastest(made, batch, 2, now)[0] == chosen


def test_a_trial_puts_everything_back(small, monkeypatch):
    made, batches = small
    free(monkeypatch)
    made(batches[0])
    state, rng = made.state_dict(), torch.get_rng_state()
    clock(monkeypatch, {2: 0.02, 1: 0.01})
    told = threads.Threads(made, ALONE, False).look(batches[1])
    assert "threads: 1 instead of 2" in told and torch.get_num_threads() == 1
    after = made.state_dict()
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(t, after["tensors"][name]) for name, t in state["tensors"].items())


def test_it_looks_again_only_after_a_while(small, monkeypatch):
    made, (batch, *_) = small
    free(monkeypatch)
    clock(monkeypatch, {2: 0.02, 1: 0.01})
    chooser = threads.Threads(made, ALONE, False)
    assert chooser.look(batch) and chooser.look(batch) is None
    clock(monkeypatch, {2: 0.01, 1: 0.02})  # the machine is idle again
    assert chooser.next > time.monotonic() + threads.AGAIN - 15  # later, if the trial took long
    chooser.next = 0.0
    assert "threads: 2 instead of 1" in chooser.look(batch)


@pytest.mark.parametrize("why", ["deterministic", "fixed", "one", "slow"])
def test_where_nothing_is_tried(small, monkeypatch, why):
    made, (batch, *_) = small
    free(monkeypatch)
    if why == "fixed":
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    if why == "one":
        torch.set_num_threads(1)
    clock(monkeypatch, {2: 2.5 if why == "slow" else 0.02, 1: 0.01})
    chooser = threads.Threads(made, ALONE, why == "deterministic")
    assert chooser.look(batch) is None and torch.get_num_threads() == (1 if why == "one" else 2)
    assert not chooser.tries
