"""`data.balance`: every class equally often, out of a folder whose classes differ in size."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
import torch
from training_runs import assert_same_end, stop_at

from fastrobust.__main__ import main as cli
from fastrobust.data import loaders
from fastrobust.data.order import Order, balanced, share
from fastrobust.runtime.distributed import World
from fastrobust.runtime.interrupt import Interrupted

CPU = torch.device("cpu")
LABELS = torch.tensor([3] * 5 + [0] * 61 + [7] * 20 + [3] * 2 + [5])  # 61, 7, 1 and 20 images of four classes


def test_every_class_comes_equally_often_and_so_does_every_image_of_it():
    total = Counter()
    for number in range(12):
        order = balanced(LABELS, 5, 1, number)
        assert len(order) == len(LABELS)
        counts = Counter(LABELS[order].tolist())
        assert counts.keys() == {0, 3, 5, 7} and max(counts.values()) - min(counts.values()) <= 1
        total.update(order.tolist())
    for label in (0, 3, 5, 7):
        times = [count for i, count in total.items() if LABELS[i] == label]
        assert len(times) == int(LABELS.eq(label).sum())
        assert max(times) - min(times) <= 1, "over all passes, also of a class that no pass can hold"


def test_the_order_is_random_and_a_function_of_the_place_alone():
    first = balanced(LABELS, 5, 1, 2)
    assert torch.equal(first, balanced(LABELS, 5, 1, 2))
    for other in ((6, 1, 2), (5, 0, 2), (5, 1, 3)):
        assert not torch.equal(first, balanced(LABELS, *other))
    runs = sum(a == b for a, b in zip(LABELS[first].tolist(), LABELS[first].tolist()[1:], strict=False))
    assert 8 < runs < 40, "classes do not take turns"
    order, again = (Order(len(LABELS), 5, 1, labels=LABELS) for _ in range(2))
    stream = torch.cat([order.take(10 * t, 10 * t + 10) for t in range(20)])
    assert torch.equal(again.take(57, 143), stream[57:143])
    assert torch.equal(stream[89 : 2 * 89], balanced(LABELS, 5, 1, 1))
    halves = [again.take(*share(4, 10, rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat(halves), stream[40:50])


@pytest.fixture
def uneven(bars, tmp_path):
    """Bars with 24, 12, 6 and 3 training images."""
    for split, counts in {"train": (24, 12, 6, 3), "test": (5, 5, 5, 5)}.items():
        for label, count in enumerate(counts):
            there = tmp_path / "uneven" / split / f"bar{label}"
            there.mkdir(parents=True)
            for file in sorted((bars / split / f"bar{label}").iterdir())[:count]:
                shutil.copy(file, there)
    return tmp_path / "uneven"


def balance(uneven, **changes):
    phases = [{"epochs": 3, "batch_size": 10, "resolution": 28}]
    return {"data__path": str(uneven), "data__balance": True, "data__limit": 45, "phases": phases} | changes


@pytest.mark.parametrize("loader", ["resident", "torch"])
def test_a_loader_gives_balanced_batches(loader, config_of, uneven):
    more = {"loader": loader, "data__augment": {"crop": "random_resized"}} if loader == "torch" else {"loader": loader}
    config, seen = config_of(**balance(uneven, **more)), []
    for world in (World(), World(0, 2), World(1, 2)):
        phases = loaders.Phases(config, CPU, world)
        batches = list(phases.enter(0).batches(0, 0, 10, 0, 9))
        phases.close()
        seen.append([batch.index.tolist() for batch in batches])
        if world.size == 1:
            counts = Counter(torch.cat([batch.labels for batch in batches]).tolist())
            assert counts.keys() == {0, 1, 2, 3} and set(counts.values()) <= {22, 23}
    assert [a + b for a, b in zip(*seen[1:], strict=True)] == seen[0]


def test_a_balanced_run_resumes_to_the_same_bits(config_of, begin, resume, uneven):
    config = config_of(**balance(uneven))
    whole = begin(config, "whole")
    whole.train()
    stopped = begin(config)
    stop_at(stopped, 7)
    with pytest.raises(Interrupted):
        stopped.train()
    again = resume(config)
    again.train()
    assert_same_end(again, whole)


def test_the_first_lines_say_it(config_file, uneven, tmp_path, capsys):
    phases = [{"epochs": 1, "batch_size": 10, "resolution": 28}]
    file = config_file(tmp_path, **balance(uneven, phases=phases, evaluation={"steps": 1, "restarts": 1}))
    assert cli(["train", str(file)]) == 0
    assert "balance: every class comes 11 times in a pass, of 3 to 24 images" in capsys.readouterr().out
