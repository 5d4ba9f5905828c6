"""Tests of the loaders ffcv, dali and torch against Pillow and against each other: the same images, labels and boxes, over
passes and seeds, for one and two processes."""

import io
import itertools
import os
import threading

import numpy as np
import pytest
import torch
from data_files import need, prepare
from loader_batches import CPU, NAMES, collect, config_for, same
from PIL import Image

from fastrobust.config import reading
from fastrobust.data import loaders, sets
from fastrobust.data.order import Order, random_crops
from fastrobust.data.prepared import shards
from fastrobust.data.prepared.records import Records
from fastrobust.runtime.distributed import World
from tests.gpusim import sim


def expected_batch(image_of, labels, resolution, seed, phase, start, stop):
    """The slow way: Pillow, one image after the other, each crop by its box. (pixels N x H x W x 3, labels, numbers)"""
    index = Order(len(labels), seed, phase).take(start, stop).tolist()
    images = []
    for k, i in enumerate(index):
        image = image_of(i)
        (box,), (flip,) = random_crops(np.array([image.height]), np.array([image.width]), seed, phase, start + k)
        top, left, h, w = box.tolist()
        image = image.resize((resolution, resolution), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
        images.append(np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image))
    return np.array(images), [labels[i] for i in index], index


TOLERANCE = {"ffcv": 2.0, "dali": 1.0, "torch": 0.0, "torch from the source": 1.5}  # mean difference of 0..255


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "seed"), [(64, 0), ("original", 7)])
def test_batches_are_what_pillow_makes_of_them(made, written, name, size, seed):
    """Over three passes. What is compared with is the stored JPEG; the source differs from it by its quality of 95."""
    found = shards.read(written / "jpeg" / "x-dali", "train", size)
    descriptors = found.open()

    def image(i):
        return Image.open(io.BytesIO(found.read(descriptors, i)))

    batches = collect(made(name, size), seed, 1, 10, 0, 11)
    worst = 0.0
    for t, (x, y, index) in enumerate(batches):
        pixels, labels, numbers = expected_batch(image, found.label.tolist(), 32, seed, 1, 10 * t, 10 * t + 10)
        assert y.tolist() == labels and index.tolist() == numbers
        difference = np.abs(x.permute(0, 2, 3, 1).numpy().astype(int) - pixels)
        worst = max(worst, difference.mean((1, 2, 3)).max())
    for descriptor in descriptors:
        os.close(descriptor)
    assert worst <= TOLERANCE[name] + 1e-9, worst


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_see_what_one_sees_and_any_batch_can_be_had(made, name):
    whole = collect(made(name), 3, 0, 8, 0, 10)
    again = collect(made(name, workers=1), 3, 0, 8, 4, 10)
    assert all(same(a, b) for a, b in zip(whole[4:], again, strict=True))
    parts = [collect(made(name, rank=rank, world=2), 3, 0, 8, 0, 10) for rank in range(2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        assert same(batch, [torch.cat(pair) for pair in zip(*halves, strict=True)])
    assert not torch.equal(whole[0].images, collect(made(name), 4, 0, 8, 0, 1)[0].images)
    assert not torch.equal(whole[0].images, collect(made(name), 3, 1, 8, 0, 1)[0].images)


@pytest.mark.parametrize("name", NAMES)
def test_test_images_are_the_squares_in_the_middle(made, photos, name):
    found = made(name, "original", 40, None, split="test").in_order()
    files = sorted((photos / "val").rglob("*.jpg"))
    assert found.images.shape == (12, 3, 40, 40) and found.classes == ("a", "b", "c")
    assert found.labels.tolist() == ["abc".index(file.parent.name) for file in files]
    expected = sets.load("image_folder", "test", photos, resolution=40)  # resized to 40, then cropped
    difference = (found.images.int() - expected.images.int()).abs().float().mean((1, 2, 3))
    assert difference.max() < 5, difference  # another resampling, and a crop that may lie half a pixel off


@pytest.mark.parametrize("name", ["resident", *NAMES])
def test_small_images_come_bit_by_bit(name, tmp_path, monkeypatch):
    """28 x 28 grey images, stored bare, padded crops left to the step: all loaders give exactly the resident batches."""
    need(name)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, 28, 28, 1), np.uint8)).permute(0, 3, 1, 2)
    data = sets.ImageSet(pixels, torch.arange(50) % 10, tuple("0123456789"), "made up")
    monkeypatch.setattr(sets, "load", lambda *a, **k: data)
    monkeypatch.setenv("FASTROBUST_DATA", str(tmp_path))
    if name in ("ffcv", "dali", "torch"):
        kind = "ffcv" if name == "ffcv" else "webdataset"
        assert prepare(kind, ["mnist", "--splits", "train"]) == 0
    shards_there = {"prepared": str(tmp_path / "mnist-dali")} if name == "torch" else {}
    config = {
        "name": "a", "loader": name.partition(" ")[0], "epsilon": 0.1, "model": {"name": "mnist_net"},
        "data": {"dataset": "mnist", "augment": {"crop": "pad", "flip": True}, "workers": 2, **shards_there},
        "method": {"name": "fgsm"}, "optimizer": {"name": "adam"}, "schedule": {"name": "cyclic", "max_lr": 0.01},
        "phases": [{"epochs": 2, "batch_size": 12}],
    }  # fmt: skip
    config = loaders.resolve(reading.parse(config, "test"), CPU)
    for world in (World(), World(1, 2)):
        loader, resident = (
            loaders.Phases(config.model_copy(update={"loader": kind}), CPU, world).enter(0)
            for kind in (config.loader, "resident")
        )
        assert isinstance(getattr(loader, "data", None), Records) == (name in ("ffcv", "dali", "torch"))
        assert not loader.crops and loader.channels == 1 and loader.classes == data.classes
        for batch, other in zip(loader.batches(1, 0, 12, 2, 9), resident.batches(1, 0, 12, 2, 9), strict=True):
            assert same(batch, other) and batch.images.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(batch.images, pixels[batch.index])
        loader.close()


# ---- which images a batch holds


@pytest.fixture(scope="module")
def grey_levels(tmp_path_factory):
    """43 training images in three classes, of many sizes, image k of the listing all of grey level 5 k: no crop, resize or
    mirroring changes it. As PNG files and as raw prepared files."""
    root = tmp_path_factory.mktemp("grey_levels")
    sizes = np.random.default_rng(0).integers(20, 90, (43, 2)).tolist()
    for k, size in enumerate(sizes):
        for split in ("train", "test"):
            file = root / "source" / split / "abc"[k // 16] / f"{k:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, (5 * k, 5 * k, 5 * k)).save(file)
    for kind in ("ffcv", "dali"):
        places = ["--data", str(root / "source"), "--output", str(root / kind)]
        assert prepare(kind, ["image_folder", *places, "--storage", "raw", "--splits", "train", "--sizes", "32"]) == 0
    return root


@pytest.mark.parametrize("name", ["resident", *NAMES])
@pytest.mark.parametrize("size", [1, 2])
def test_a_batch_says_which_images_it_holds(grey_levels, name, size):
    """Of one process and of two, over two passes; read off the pixels, and off the class that the number stands for."""
    need(name)
    files = {"ffcv": "ffcv", "dali": "dali", "torch": "dali"}.get(name)
    data = {"prepared": str(grey_levels / files)} if files else {}
    phases = [{"epochs": 2, "batch_size": 12, "resolution": 16, "resize": 32}]
    changes = {"loader": name.partition(" ")[0], "data": {**data, "workers": 2}, "phases": phases}
    config = loaders.resolve(config_for(grey_levels / "source", **changes), CPU)
    seen = [[] for _ in range(8)]
    for rank in range(size):
        loader = loaders.Phases(config, CPU, World(rank, size)).enter(0)
        assert isinstance(getattr(loader, "data", None), Records) == (files is not None)
        for t, batch in enumerate(loader.batches(4, 0, 12, 0, 8)):
            assert batch.index.dtype == torch.int64 and batch.index.shape == batch.labels.shape == (12 // size,)
            assert torch.equal(batch.images, (5 * batch.index[:, None, None, None]).expand_as(batch.images))
            assert torch.equal(batch.labels, batch.index // 16)
            seen[t] += batch.index.tolist()
        loader.close()
    stream = [k for t in range(8) for k in seen[t]]
    assert len(stream) == 96 and sorted(stream[:43]) == sorted(stream[43:86]) == list(range(43))
    assert stream[:43] != sorted(stream[:43])


@pytest.mark.parametrize("name", NAMES)
def test_a_loop_may_be_left_and_begun_anew(made, name):
    loader = made(name)
    whole = collect(loader, 0, 0, 8, 0, 6)
    for stop in (1, 3):
        threads = threading.active_count()
        for batch, expected in zip(itertools.islice(loader.batches(0, 0, 8, 0, 6), stop), whole, strict=False):
            assert same(batch, expected)
        assert threading.active_count() <= threads + 2
    again = collect(loader, 0, 0, 8, 0, 6)
    assert all(same(a, b) for a, b in zip(whole, again, strict=True))
    assert collect(loader, 0, 0, 8, 3, 3) == []


@pytest.mark.parametrize("name", NAMES)
def test_torchs_own_generator_is_left_alone(made, name):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    collect(made(name), 0, 0, 8, 0, 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.skipif(sim.HERE, reason="the simulated GPU computes nothing")
@pytest.mark.parametrize("name", NAMES)
def test_batches_on_a_gpu_are_those_of_the_cpu(made, name):
    """DALI decodes there (`mixed`), with a decoder of its own; the others only copy."""
    expected = collect(made(name), 2, 0, 8, 0, 9)
    loader = made(name)
    loader.device = torch.device("cuda")
    for (x, y, index), (u, v, w) in zip(loader.batches(2, 0, 8, 0, 9), expected, strict=True):
        assert x.is_cuda and y.is_cuda and index.is_cuda and x.is_contiguous(memory_format=torch.channels_last)
        assert y.tolist() == v.tolist() and index.tolist() == w.tolist()
        difference = (x.cpu().int() - u.int()).abs().float().mean()
        assert difference <= (3 if name == "dali" else 0)
