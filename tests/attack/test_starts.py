"""Tests of the random starts of PGD, and of how the examples that are still robust are packed into batches."""

import pytest
import torch

from fastrobust.attack.pgd import packed
from fastrobust.attack.threat import Threat


@pytest.mark.parametrize("size", [1, 255, 256, 257, 700])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.6, 1.0])
@pytest.mark.parametrize("batch_size", [1, 100, 300])
def test_packing_gives_each_living_example_once_in_full_batches_with_its_own_noise(size, share, batch_size):
    images = torch.zeros(size, 1, 2, 2, dtype=torch.uint8)
    alive = torch.rand(size, generator=torch.Generator().manual_seed(size)) < share
    batches = list(packed(images, alive, Threat(0.3), batch_size, (4, 2)))
    assert [i for index, _ in batches for i in index.tolist()] == alive.nonzero().flatten().tolist()
    assert all(len(index) == len(noise) == batch_size for index, noise in batches[:-1])
    assert all(1 <= len(index) <= batch_size for index, _ in batches)
    ((_, noise_of_all),) = packed(images, torch.ones(size, dtype=torch.bool), Threat(0.3), size, (4, 2))
    for index, noise in batches:
        assert torch.equal(noise, noise_of_all[index])


def test_noise_is_uniform_and_differs_by_seed_restart_and_example():
    images = torch.zeros(600, 3, 8, 8, dtype=torch.uint8)
    alive = torch.ones(600, dtype=torch.bool)
    draws = [next(packed(images, alive, Threat(0.2), 600, key))[1] for key in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 0))]
    assert torch.equal(draws[0], draws[4])
    examples = torch.cat([d.flatten(1) for d in draws[:4]])
    assert len(examples.unique(dim=0)) == 4 * 600
    values = examples.flatten()
    assert -0.2 <= values.min() < -0.1999 and 0.1999 < values.max() <= 0.2
    quartiles = torch.tensor([(values < q).float().mean() for q in (-0.1, 0.0, 0.1)])
    torch.testing.assert_close(quartiles, torch.tensor([0.25, 0.5, 0.75]), rtol=0, atol=0.005)
