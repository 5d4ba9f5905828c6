"""Tests of the loaders ffcv, dali and torch against Pillow and against each other: the same images, labels and boxes, over
passes and seeds, for one and two processes; and what happens to damaged files and dead workers."""

import fcntl
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import prepare
from PIL import Image

from fastrobust.config import reading
from fastrobust.config.schema import Augment
from fastrobust.data import loaders, sets
from fastrobust.data.loaders.dali import Dali
from fastrobust.data.loaders.ffcv import Ffcv, native
from fastrobust.data.loaders.torch_workers import Torch
from fastrobust.data.order import Order, random_crops
from fastrobust.data.prepared import beton, shards
from fastrobust.runtime.errors import ConfigError, DataError, FastrobustError

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
NAMES = ["ffcv", "dali", "torch", "torch from the source"]
RANDOM = Augment(crop="random_resized", flip=True)


def need(name: str) -> None:
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    if name == "ffcv":
        try:
            native()
        except ConfigError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="session")
def written(photos, tmp_path_factory):
    """The photos in both formats, at 64 pixels and as they are. Raw, so that what differs is the resizing alone."""
    root = tmp_path_factory.mktemp("written")
    for kind, folder in (("ffcv", "x-ffcv"), ("webdataset", "x-dali")):
        for storage in ("raw", "jpeg"):
            arguments = ["--sizes", "64", "original", "--storage", storage, "--quality", "95"]
            output = ["--source", str(photos), "--output", str(root / storage / folder)]
            assert prepare(kind, ["image_folder", *output, *arguments]) == 0
    return root


@pytest.fixture
def made(written, photos):
    """made(name, size, resolution, …) -> a loader of the photos."""
    opened = []

    def make(name, size=64, resolution=32, augment=RANDOM, rank=0, world=1, workers=2, storage="jpeg", split="train"):
        need(name)
        facts = (3, resolution, augment, CPU, workers, rank, world)
        if name == "ffcv":
            loader = Ffcv(beton.read(written / storage / "x-ffcv", split, size), *facts)
        elif name == "dali":
            loader = Dali(shards.read(written / storage / "x-dali", split, size), *facts)
        elif name == "torch":
            loader = Torch(shards.read(written / storage / "x-dali", split, size), size, *facts)
        else:
            loader = Torch(sets.pictures("image_folder", split, photos), size, *facts)
        opened.append(loader)
        return loader

    yield make
    for loader in opened:
        loader.close()


def collect(loader, seed, phase, batch_size, first, last):
    batches = [(x.clone(), y.clone()) for x, y in loader.batches(seed, phase, batch_size, first, last)]
    shape = (batch_size // loader.world, loader.channels, loader.resolution, loader.resolution)
    for x, y in batches:
        assert x.shape == shape and x.dtype == torch.uint8 and x.is_contiguous(memory_format=torch.channels_last)
        assert y.shape == shape[:1] and y.dtype == torch.int64
    return batches


def expected_batch(records_or_pictures, labels, resolution, seed, phase, start, stop):
    """The slow way: Pillow, one image after the other, each crop by its box."""
    index = Order(len(labels), seed, phase).take(start, stop).tolist()
    images = []
    for k, i in enumerate(index):
        image = records_or_pictures(i)
        (box,), (flip,) = random_crops(np.array([image.height]), np.array([image.width]), seed, phase, start + k)
        top, left, h, w = box.tolist()
        image = image.resize((resolution, resolution), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
        images.append(np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image))
    return np.array(images), [labels[i] for i in index]


TOLERANCE = {"ffcv": 2.0, "dali": 1.0, "torch": 0.0, "torch from the source": 1.5}  # mean difference of 0..255


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "seed"), [(64, 0), ("original", 7)])
def test_batches_are_what_pillow_makes_of_them(made, written, name, size, seed):
    """Over three passes. What is compared with is the stored JPEG; the source differs from it by its quality of 95."""
    found = shards.read(written / "jpeg" / "x-dali", "train", size)
    descriptors = found.open()

    def image(i):
        import io

        return Image.open(io.BytesIO(found.read(descriptors, i)))

    batches = collect(made(name, size), seed, 1, 10, 0, 11)
    worst = 0.0
    for t, (x, y) in enumerate(batches):
        pixels, labels = expected_batch(image, found.label.tolist(), 32, seed, 1, 10 * t, 10 * t + 10)
        assert y.tolist() == labels
        difference = np.abs(x.permute(0, 2, 3, 1).numpy().astype(int) - pixels)
        worst = max(worst, difference.mean((1, 2, 3)).max())
    for descriptor in descriptors:
        os.close(descriptor)
    assert worst <= TOLERANCE[name] + 1e-9, worst


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_see_what_one_sees_and_any_batch_can_be_had(made, name):
    whole = collect(made(name), 3, 0, 8, 0, 10)
    again = collect(made(name, workers=1), 3, 0, 8, 4, 10)
    for (x, y), (u, v) in zip(whole[4:], again, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
    parts = [collect(made(name, rank=rank, world=2), 3, 0, 8, 0, 10) for rank in range(2)]
    for (x, y), (a, b), (c, d) in zip(whole, *parts, strict=True):
        assert torch.equal(x, torch.cat([a, c])) and torch.equal(y, torch.cat([b, d]))
    assert not torch.equal(whole[0][0], collect(made(name), 4, 0, 8, 0, 1)[0][0])
    assert not torch.equal(whole[0][0], collect(made(name), 3, 1, 8, 0, 1)[0][0])


@pytest.mark.parametrize("name", NAMES)
def test_test_images_are_the_squares_in_the_middle(made, photos, name):
    found = made(name, "original", 40, None, split="test").in_order(batch_size=5)
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
    config = {
        "name": "a", "loader": name.partition(" ")[0], "epsilon": 0.1, "model": {"name": "mnist_net"},
        "data": {"dataset": "mnist", "augment": {"crop": "pad", "flip": True}, "workers": 2},
        "method": {"name": "fgsm"}, "optimizer": {"name": "adam"}, "schedule": {"name": "cyclic", "max_lr": 0.01},
        "phases": [{"epochs": 2, "batch_size": 12}],
    }  # fmt: skip
    config = reading.parse(config, "test")
    for rank, world in ((0, 1), (1, 2)):
        loader = loaders.for_phase(config, config.loader, 0, CPU, rank, world)
        resident = loaders.for_phase(config, "resident", 0, CPU, rank, world)
        assert not loader.crops and loader.channels == 1 and loader.classes == data.classes
        for (x, y), (u, v) in zip(loader.batches(1, 0, 12, 2, 9), resident.batches(1, 0, 12, 2, 9), strict=True):
            assert torch.equal(x, u) and torch.equal(y, v)
            assert x.is_contiguous(memory_format=torch.channels_last)
        loader.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_loop_may_be_left_and_begun_anew(made, name):
    loader = made(name)
    whole = collect(loader, 0, 0, 8, 0, 6)
    for stop in (1, 3):
        threads = threading.active_count()
        for (x, _), (u, _) in zip(itertools.islice(loader.batches(0, 0, 8, 0, 6), stop), whole, strict=False):
            assert torch.equal(x, u)
        assert threading.active_count() <= threads + 2
    again = collect(loader, 0, 0, 8, 0, 6)
    assert all(torch.equal(x, u) for (x, _), (u, _) in zip(whole, again, strict=True))
    assert collect(loader, 0, 0, 8, 3, 3) == []


@pytest.mark.parametrize("name", NAMES)
def test_torchs_own_generator_is_left_alone(made, name):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    collect(made(name), 0, 0, 8, 0, 3)
    assert torch.equal(torch.get_rng_state(), before)


# ---- damage


def copied(written, tmp_path, folder):
    import shutil

    return shutil.copytree(written / "jpeg" / folder, tmp_path / folder)


@pytest.mark.parametrize("name", ["ffcv", "dali", "torch"])
@pytest.mark.parametrize("damage", ["cut short", "one bit", "overwritten, with its checksum"])
def test_damage_while_training_is_an_error_at_once(made, written, tmp_path, name, damage):
    """A file that shrinks, or whose bytes go bad, after it was opened."""
    need(name)
    folder = copied(written, tmp_path, "x-ffcv" if name == "ffcv" else "x-dali")
    found = (beton if name == "ffcv" else shards).read(folder, "train", 64)
    loader = made(name)
    loader.records = loader.data = found
    for descriptor in loader.files:
        os.close(descriptor)
    loader.files = found.open()
    middle = int(found.offset[18])
    with open(found.files[0], "r+b") as file:
        if damage == "cut short":
            file.truncate(middle + 20)
        elif damage == "one bit":  # the decoders would not notice
            file.seek(middle + int(found.length[18]) - 20)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        else:
            file.seek(middle)
            zeros = bytes(int(found.length[18]))
            file.write(zeros)
            found.crc[18] = zlib.crc32(zeros)
    began = time.monotonic()
    said = {"cut short": "cut short", "one bit": "its checksum differs"}.get(damage, "is damaged")
    with pytest.raises(DataError, match=said):
        collect(loader, 0, 0, 8, 0, 6)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("name", ["ffcv", "dali", "torch"])
def test_a_file_cut_short_before_the_start_is_refused(written, tmp_path, name):
    folder = copied(written, tmp_path, "x-ffcv" if name == "ffcv" else "x-dali")
    read = beton.read if name == "ffcv" else shards.read
    file = read(folder, "train", 64).files[0]
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(DataError, match="bytes instead of"):
        read(folder, "train", 64)


def test_a_dead_worker_is_an_error_within_seconds(made, monkeypatch):
    loader = made("torch from the source")

    def die(i):
        os.kill(os.getpid(), signal.SIGKILL)

    loader.data = loader.data._replace(image=die)
    began = time.monotonic()
    with pytest.raises(DataError, match="a worker of the torch loader died"):
        collect(loader, 0, 0, 8, 0, 6)
    assert time.monotonic() - began < 30


def test_a_corrupt_source_names_the_file(made):
    loader = made("torch from the source")
    image = loader.data.image

    def spoilt(i):
        if i == 5:
            raise DataError("photo 5 is not a usable image")
        return image(i)

    loader.data = loader.data._replace(image=spoilt)
    with pytest.raises(DataError, match="photo 5 is not a usable image"):
        collect(loader, 0, 0, 8, 0, 6)


# ---- choosing


def config_for(photos, **changes):
    data = {"dataset": "image_folder", "path": str(photos), "augment": {"crop": "random_resized", "flip": True}}
    base = {
        "name": "a", "epsilon": 0.1, "data": data | changes.pop("data", {}), "model": {"name": "preact_resnet18_w16"},
        "method": {"name": "fgsm"}, "optimizer": {"name": "sgd"}, "schedule": {"name": "cyclic", "max_lr": 0.01},
        "phases": [{"epochs": 1, "batch_size": 8, "resolution": 32, "resize": 64}],
    }  # fmt: skip
    return reading.parse(base | changes, "test")


def test_auto_takes_what_is_there(photos, written, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTROBUST_DATA", str(tmp_path))
    original = [{"epochs": 1, "batch_size": 8, "resolution": 32, "resize": "original"}]
    assert loaders.choose(config_for(photos), CPU) == "resident"
    assert loaders.choose(config_for(photos, phases=original), CPU) == "torch"
    monkeypatch.setattr(loaders.formats, "available_memory", lambda: 37 * 64**2 * 3 * 2)
    assert loaders.choose(config_for(photos), CPU) == "torch"
    packages = {"ffcv", "nvidia.dali"}
    monkeypatch.setattr(loaders, "installed", lambda package: package in packages)
    ffcv, dali = (config_for(photos, data={"prepared": str(written / "jpeg" / f"x-{kind}")}) for kind in ("ffcv", "dali"))
    assert loaders.choose(ffcv, CPU) == "ffcv" and loaders.choose(dali, CPU) == "dali"
    other = [{"epochs": 1, "batch_size": 8, "resolution": 32, "resize": 99}]  # a size that was not written
    assert loaders.choose(ffcv.model_copy(update={"phases": config_for(photos, phases=other).phases}), CPU) == "torch"
    packages.clear()
    assert loaders.choose(ffcv, CPU) == "torch"
    assert loaders.choose(config_for(photos, loader="dali"), CPU) == "dali"


def test_what_cannot_be_loaded_is_explained(photos, written, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROBUST_DATA", str(tmp_path))
    prepared = {"prepared": str(written / "jpeg" / "x-ffcv")}
    with pytest.raises(ConfigError, match=r"set data\.prepared to the folder"):
        loaders.for_phase(config_for(photos), "ffcv", 0, CPU)
    with pytest.raises(DataError, match=r"train_64\.json does not exist"):
        loaders.for_phase(config_for(photos, data={"prepared": str(tmp_path)}), "ffcv", 0, CPU)
    with pytest.raises(ConfigError, match="holds image_folder, not imagenet"):
        loaders.for_phase(config_for(photos, data={"dataset": "imagenet", **prepared}), "ffcv", 0, CPU)
    with pytest.raises(ConfigError, match="batch_size is 8: 3 processes cannot share it"):
        loaders.for_phase(config_for(photos, data=prepared), "ffcv", 0, CPU, 0, 3)
    with pytest.raises(ConfigError, match="but there are only 5 images"):
        loaders.for_phase(config_for(photos, data={"limit": 5}), "torch", 0, CPU)
    original = [{"epochs": 1, "batch_size": 8, "resolution": 32, "resize": "original"}]
    with pytest.raises(ConfigError, match="resident holds squares of one size"):
        loaders.for_phase(config_for(photos, phases=original), "resident", 0, CPU)
    with pytest.raises(DataError, match="holds 37 images, the first phase's file 36"):
        loaders.check(config_for(photos, data=prepared), "ffcv", 36)
    native.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FastrobustError, match="ffcv is not installed; install it with `apt-get"):
        native()
    native.cache_clear()


def test_limit_takes_an_even_part(photos, written):
    data = {"limit": 10, "prepared": str(written / "jpeg" / "x-ffcv")}
    found = loaders.read_records(config_for(photos, data=data), "ffcv", "train", 64)
    whole = beton.read(written / "jpeg" / "x-ffcv", "train", 64)
    assert found.offset.tolist() == whole.offset[sets.evenly_spaced(37, 10)].tolist()
    assert json.dumps(found.manifest) == json.dumps(whole.manifest)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", NAMES)
def test_batches_on_a_gpu_are_those_of_the_cpu(made, name):
    """DALI decodes there (`mixed`), with a decoder of its own; the others only copy."""
    expected = collect(made(name), 2, 0, 8, 0, 9)
    loader = made(name)
    loader.device = torch.device("cuda")
    for (x, y), (u, v) in zip(loader.batches(2, 0, 8, 0, 9), expected, strict=True):
        assert x.is_cuda and y.is_cuda and x.is_contiguous(memory_format=torch.channels_last) and y.tolist() == v.tolist()
        difference = (x.cpu().int() - u.int()).abs().float().mean()
        assert difference <= (3 if name == "dali" else 0)


def test_a_worker_that_dies_during_a_step_is_an_error_at_the_next_batch(made):
    """Not in the middle of whatever the step is doing."""
    loader = made("torch from the source")
    batches = loader.batches(0, 0, 4, 0, 200)
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # the step: what SIGCHLD brings, it brings here
    with pytest.raises(DataError, match="a worker of the torch loader died"):
        for _ in batches:
            pass


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's prctl")
def test_workers_die_with_the_process_that_they_work_for(tmp_path):
    """A worker in the middle of a long batch holds the locks that it inherited. Killed, its parent takes it along."""
    script = tmp_path / "parent.py"
    script.write_text("""
import fcntl, os, sys, time
import numpy as np, torch
from fastrobust.data.dataloader import Torch
from fastrobust.data.sources import Pictures

lock = open("lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)

def image(i):
    open(f"busy{i}", "w").close()
    time.sleep(600)

data = Pictures(image, str, str, np.zeros(8, np.int64), ("a",), "x")
next(Torch(data, 8, 3, 8, None, torch.device("cpu"), 2).batches(0, 0, 1, 0, 8))
""")
    parent = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("busy*"))) < 2 and parent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(list(tmp_path.glob("busy*"))) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    with open(tmp_path / "lock") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, "a worker still holds the lock"
                time.sleep(0.05)
