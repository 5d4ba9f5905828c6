"""Prepared files and loaders of the made-up photos, and the batches that loaders give. The fixtures are in conftest.py."""

from __future__ import annotations

from pathlib import Path

import torch
from data_files import need, prepare

from fastrobust.config import reading
from fastrobust.config.schema import Config
from fastrobust.config.sections import Augment
from fastrobust.data import sets
from fastrobust.data.batch import Batch
from fastrobust.data.loaders.base import Loader
from fastrobust.data.loaders.dali import Dali
from fastrobust.data.loaders.ffcv import Ffcv
from fastrobust.data.loaders.torch_workers import Torch
from fastrobust.data.prepared import beton, shards

CPU = torch.device("cpu")
NAMES = ["ffcv", "dali", "torch", "torch from the source"]
RANDOM = Augment(crop="random_resized", flip=True)


def write_prepared(source: Path, root: Path) -> Path:
    """An image folder in both formats, at 64 pixels and as it is, as raw pixels and as JPEG: root/{raw,jpeg}/x-{ffcv,dali}.
    Raw, so that what differs is the resizing alone."""
    for kind, folder in (("ffcv", "x-ffcv"), ("webdataset", "x-dali")):
        for storage in ("raw", "jpeg"):
            arguments = ["--sizes", "64", "original", "--storage", storage, "--quality", "95"]
            places = ["--data", str(source), "--output", str(root / storage / folder)]
            assert prepare(kind, ["image_folder", *places, *arguments]) == 0
    return root


def open_loader(
    name, written, source, size=64, resolution=32, augment=RANDOM, rank=0, world=1, workers=2, storage="jpeg", split="train"
) -> Loader:
    """A loader of prepared files (see `write_prepared`) or of the source. The test is skipped where it cannot run."""
    need(name)
    facts = (size, 3, resolution, augment, CPU, workers, rank, world)
    if name == "ffcv":
        return Ffcv(beton.read(written / storage / "x-ffcv", split, size), *facts)
    if name == "dali":
        return Dali(shards.read(written / storage / "x-dali", split, size), *facts)
    if name == "torch":
        return Torch(shards.read(written / storage / "x-dali", split, size), *facts)
    return Torch(sets.pictures("image_folder", split, source), *facts)


def collect(loader, seed, phase, batch_size, first, last) -> list[Batch]:
    """The batches, their form checked."""
    batches = [Batch(*(t.clone() for t in batch)) for batch in loader.batches(seed, phase, batch_size, first, last)]
    shape = (batch_size // loader.world, loader.channels, loader.resolution, loader.resolution)
    for x, y, index in batches:
        assert x.shape == shape and x.dtype == torch.uint8 and x.is_contiguous(memory_format=torch.channels_last)
        assert y.shape == index.shape == shape[:1] and y.dtype == index.dtype == torch.int64
    return batches


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def config_for(source: Path, **changes) -> Config:
    """The config, not resolved, of one epoch on an image folder with random crops: 32 x 32 pixels out of 64."""
    data = {"dataset": "image_folder", "path": str(source), "augment": {"crop": "random_resized", "flip": True}}
    base = {
        "name": "a", "epsilon": 0.1, "data": data | changes.pop("data", {}), "model": {"name": "preact_resnet18_w16"},
        "method": {"name": "fgsm"}, "optimizer": {"name": "sgd"}, "schedule": {"name": "cyclic", "max_lr": 0.01},
        "phases": [{"epochs": 1, "batch_size": 8, "resolution": 32, "resize": 64}],
    }  # fmt: skip
    return reading.parse(base | changes, "test")
