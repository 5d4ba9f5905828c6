"""Tests of fastrobust.data.loaders.resident: the stream of batches against slow lists of indices."""

import itertools

import pytest
import torch

from fastrobust.data.loaders.resident import Resident
from fastrobust.data.order import end_of_pass, permutation
from fastrobust.data.sets import ImageSet

SIZES = [(10, 3), (10, 5), (10, 10), (7, 4), (64, 48), (1, 1), (5, 1), (13, 12)]


def make(n: int) -> Resident:
    """Image k holds the bytes of k, and its label is 3 k."""
    numbers = torch.arange(n)
    images = torch.zeros(n, 2, 2, 3, dtype=torch.uint8)
    images[..., 0], images[..., 1] = (numbers % 256)[:, None, None], (numbers // 256)[:, None, None]
    images[..., 2] = torch.tensor([[1, 2], [3, 4]])
    return Resident(ImageSet(images.permute(0, 3, 1, 2), 3 * numbers, ("a",), "made up"), torch.device("cpu"))


def indices(data: Resident, batch_size: int, first: int, last: int, seed: int = 0, phase: int = 0) -> list[list[int]]:
    """The examples of each batch, read off the pixels; labels and numbers must belong to them."""
    found = []
    for images, labels, index in data.batches(seed, phase, batch_size, first, last):
        assert images.shape == (batch_size, 3, 2, 2) and images.dtype == torch.uint8
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images[:, 2].tolist() == [[[1, 2], [3, 4]]] * batch_size
        assert labels.shape == (batch_size,) and labels.dtype == torch.int64
        numbers = images[:, 0, 0, 0].long() + 256 * images[:, 1, 0, 0].long()
        assert labels.tolist() == (3 * numbers).tolist()
        assert index.dtype == torch.int64 and index.tolist() == numbers.tolist()
        found.append(numbers.tolist())
    return found


@pytest.mark.parametrize(("n", "batch_size"), SIZES)
def test_every_pass_holds_every_example_once(n, batch_size):
    data, passes = make(n), 5
    last = end_of_pass(passes - 1, n, batch_size)
    batches = indices(data, batch_size, 0, last)
    assert len(batches) == last
    stream = [i for batch in batches for i in batch]
    for k in range(passes):
        assert sorted(stream[k * n : (k + 1) * n]) == list(range(n)), k
    rest = stream[passes * n :]  # the filled-up end: examples of one permutation more
    assert len(rest) < batch_size and len(set(rest)) == len(rest)
    counts = [stream[: passes * n].count(i) for i in range(n)]
    assert counts == [passes] * n


@pytest.mark.parametrize(("n", "batch_size"), SIZES)
def test_the_stream_is_pass_after_pass(n, batch_size):
    """Against the slow way: write all permutations one after the other, cut into batches."""
    stream = [i for k in range(7) for i in permutation(n, 3, 1, k).tolist()]
    count = 6 * n // batch_size
    expected = [stream[t * batch_size : (t + 1) * batch_size] for t in range(count)]
    assert indices(make(n), batch_size, 0, count, seed=3, phase=1) == expected


@pytest.mark.parametrize(("n", "batch_size"), SIZES)
def test_any_batch_can_be_had_at_any_time(n, batch_size):
    data = make(n)
    batches = indices(data, batch_size, 0, 12)
    for first in range(13):
        assert indices(data, batch_size, first, 12) == batches[first:]
    assert indices(data, batch_size, 5, 5) == []


def test_the_data_set_does_not_matter_to_resuming():
    """A second object, as after a restart, gives the same batches."""
    assert indices(make(50), 8, 3, 20, seed=5) == indices(make(50), 8, 0, 20, seed=5)[3:]


def test_seed_phase_and_pass_change_the_order():
    orders = {
        (seed, phase, k): tuple(permutation(100, seed, phase, k).tolist())
        for seed, phase, k in itertools.product(range(4), range(3), range(5))
    }
    assert len(set(orders.values())) == len(orders)
    assert all(sorted(order) == list(range(100)) for order in orders.values())
    assert orders[2, 1, 3] == tuple(permutation(100, 2, 1, 3).tolist())
    data = make(100)
    one = indices(data, 10, 0, 10)
    assert one != indices(data, 10, 0, 10, seed=1) != indices(data, 10, 0, 10, phase=1) != one
    assert one != indices(data, 10, 10, 20)


def test_the_largest_seed_works():
    assert sorted(permutation(20, 2**31 - 1, 9, 999).tolist()) == list(range(20))


def test_orders_are_random():
    """Each example stands in the first half of a pass about half of the time."""
    n, passes = 20, 400
    firsts = torch.zeros(n)
    for k in range(passes):
        firsts[permutation(n, 0, 0, k)[: n // 2]] += 1
    assert (firsts - passes / 2).abs().max() < 4.5 * (passes / 4) ** 0.5


def test_torchs_own_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    indices(make(20), 6, 0, 9)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("n", "batch_size"), [*SIZES, (60_000, 100), (50_000, 128)])
def test_end_of_pass_is_the_first_batch_with_everything(n, batch_size):
    for k in range(20):
        batches = end_of_pass(k, n, batch_size)
        assert (batches - 1) * batch_size < (k + 1) * n <= batches * batch_size


def test_no_image_is_dropped_where_batches_do_not_divide():
    """Trap 8: CIFAR-10 has 80 images over at 128; 15 epochs are 5860 updates of 128, not 5850."""
    assert end_of_pass(14, 50_000, 128) == 5860
    assert [end_of_pass(k, 50_000, 128) for k in range(3)] == [391, 782, 1172]
    assert end_of_pass(9, 60_000, 100) == 6000


def test_images_are_kept_as_they_are():
    data = make(300)
    assert len(data) == 300 and data.images.dtype == torch.uint8 and data.images.shape == (300, 2, 2, 3)
    assert data.images[:, 0, 0, 0].tolist() == [k % 256 for k in range(300)]
    assert data.images.is_contiguous()


def test_a_batch_is_a_copy():
    """Whoever writes into its images or labels does not spoil the data."""
    data = make(6)
    for batch in data.batches(0, 0, 6, 0, 1):
        batch.images.zero_()
        batch.labels.zero_()
    assert sorted(i for batch in indices(data, 6, 1, 2) for i in batch) == list(range(6))


def test_the_first_of_a_batch():
    (batch,) = make(9).batches(0, 0, 6, 0, 1)
    first = batch.first(2)
    assert first.labels.tolist() == batch.labels[:2].tolist() == (3 * first.index).tolist()
    assert torch.equal(first.images, batch.images[:2]) and len(first.index) == 2
