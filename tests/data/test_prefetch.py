"""Tests of fastrobust.data.loaders.prefetch: batches made ahead, in a thread."""

import threading
import time

import pytest
import torch

from fastrobust.data.batch import Batch
from fastrobust.data.loaders import prefetch


def batches(count: int, fail_at: int | None = None):
    for k in range(count):
        if k == fail_at:
            raise ValueError("batch 3 is bad")
        yield Batch(torch.full((2,), k), torch.full((2,), -k), torch.full((2,), 10 * k))


def test_the_same_batches_in_the_same_order():
    found = list(prefetch.on_device(prefetch.ahead(batches(20), 3), torch.device("cpu")))
    assert all(isinstance(batch, Batch) for batch in found)
    assert [tuple(t[0].item() for t in batch) for batch in found] == [(k, -k, 10 * k) for k in range(20)]
    assert list(prefetch.ahead([], 3)) == []


def test_an_error_in_the_thread_is_raised_after_the_batches_before_it():
    found = []
    with pytest.raises(ValueError, match="batch 3 is bad"):
        for batch in prefetch.ahead(batches(9, fail_at=3), 2):
            found.append(batch.images[0].item())
    assert found == [0, 1, 2]


def test_it_runs_ahead_and_no_further_and_ends_when_left():
    made = []

    def counted():
        for batch in batches(100):
            made.append(1)
            yield batch

    running = threading.active_count()
    iterator = prefetch.ahead(counted(), 3)
    next(iterator)
    time.sleep(0.5)
    assert len(made) == 5  # the one taken, three in the queue, one waiting to be put
    iterator.close()
    assert threading.active_count() == running


def test_a_thread_that_dies_is_an_error(monkeypatch):
    monkeypatch.setattr(prefetch, "PATIENCE", 0.05)
    monkeypatch.setattr(threading.Thread, "run", lambda self: None)
    with pytest.raises(RuntimeError, match="thread died"):
        next(prefetch.ahead(batches(3), 2))
