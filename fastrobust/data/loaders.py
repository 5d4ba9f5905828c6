"""Choosing the loader of a run and making it for a phase.

A loader has `classes`, `channels`, a length, `crops` (whether its images come cropped and mirrored at random; else the
training step does it) and `batches(seed, phase, batch_size, first, last)`: uint8 B x C x H x W in channels-last memory on
the device, and int64 labels, of one shape within a phase.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from fastrobust import distributed
from fastrobust.data import beton, formats, records, shards, sources
from fastrobust.data.dataloader import Torch
from fastrobust.data.loader import Loader
from fastrobust.data.resident import Resident
from fastrobust.errors import ConfigError, DataError
from fastrobust.schema import CHANNELS, Config

READERS = {"ffcv": beton.read, "dali": shards.read}  # the files that a loader needs


def choose(config: Config, device: torch.device) -> str:
    """The loader of a run: the config's, or for `auto` the best that is installed: prepared files with ffcv or dali, else
    what fits into memory, else torch."""
    if config.loader != "auto":
        return config.loader
    small = sources.DATASETS[config.data.dataset].size is not None
    return ready(config) or ("resident" if small or fits(config, device) else "torch")


def ready(config: Config) -> str | None:
    """The loader that is installed and has prepared files, for images that are not small."""
    if sources.DATASETS[config.data.dataset].size is None:
        for name, package in (("ffcv", "ffcv"), ("dali", "nvidia.dali")):
            if prepared(config, name) and installed(package):
                return name
    return None


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def stored(config: Config, phase) -> records.Size:
    """The size of the files that a phase reads."""
    return phase.resize if sources.DATASETS[config.data.dataset].size is None else "original"


def folder(config: Config, name: str) -> Path | None:
    """Where a loader's prepared files are, if the config lets that be known."""
    data = config.data
    if data.prepared:
        return Path(data.prepared).expanduser()
    if data.path is None:
        return records.prepared_folder(data.dataset, "ffcv" if name == "ffcv" else "webdataset")
    return None


def prepared(config: Config, name: str) -> bool:
    """Whether the files of all phases are there."""
    place = folder(config, name)
    try:
        return place is not None and all(READERS[name](place, "train", stored(config, phase)) for phase in config.phases)
    except DataError:
        return False


def fits(config: Config, device: torch.device) -> bool:
    """Whether the largest phase's images take less than half of the memory that they would live in."""
    if any(phase.resize == "original" for phase in config.phases):
        return False
    count = len(sources.list_images(config.data.dataset, "train", config.data.path, config.data.limit).labels)
    needed = max(count * phase.resize**2 * 3 for phase in config.phases)
    free = formats.available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    return needed < free / 2


def read_records(config: Config, name: str, split: str, size: records.Size) -> records.Records:
    place = folder(config, name)
    if place is None:
        raise ConfigError(f"loader: {name} reads prepared files: set data.prepared to the folder they were written to")
    found = READERS[name](place, split, size)
    if found.manifest["dataset"] != config.data.dataset:
        raise ConfigError(f"{place} holds {found.manifest['dataset']}, not {config.data.dataset}: set data.prepared")
    return found if config.data.limit is None else found.take(sources.evenly_spaced(len(found), config.data.limit))


def check(config: Config, name: str, examples: int) -> None:
    """Raise unless every phase has the files it needs and all of them hold the same number of images."""
    for phase in config.phases:
        if name in READERS or (name == "torch" and from_shards(config)):
            found = read_records(config, "dali" if name == "torch" else name, "train", stored(config, phase))
            if len(found) != examples:
                raise DataError(
                    f"{found.files[0]} holds {len(found)} images, the first phase's file {examples}: write both anew"
                )


def from_shards(config: Config) -> bool:
    """Whether the torch loader reads prepared shards rather than the source."""
    return prepared(config, "dali")


def for_phase(config: Config, name: str, index: int, device: torch.device, rank: int = 0, world: int = 1):
    """The loader of a phase. Raises ConfigError or DataError."""
    data, phase = config.data, config.phases[index]
    if phase.batch_size % world:
        raise ConfigError(f"phases.{index}.batch_size is {phase.batch_size}: {world} processes cannot share it equally")
    if name == "resident":
        if any(phase.resize == "original" for phase in config.phases):
            raise ConfigError(
                "loader: resident holds squares of one size: set phases.N.resize to a number, or another loader"
            )
        size = phase.resize if sources.DATASETS[data.dataset].size is None else None
        found = sources.load(data.dataset, "train", data.path, resolution=size, download=data.download, limit=data.limit)
        loader = Resident(found, device, rank, world)
    else:
        loader = decoding(config, name, "train", stored(config, phase), phase.resolution, device, rank, world)
    if len(loader) < phase.batch_size:
        raise ConfigError(f"phases.{index}.batch_size is {phase.batch_size}, but there are only {len(loader)} images")
    return loader


def decoding(
    config: Config, name: str, split: str, size: records.Size, resolution: int, device: torch.device, rank=0, world=1
) -> Loader:
    data = config.data
    workers = data.workers or max(1, formats.cores() // distributed.on_this_machine(world))
    channels = CHANNELS[data.dataset]
    augment = data.augment if split == "train" else None
    facts = (channels, resolution, augment, device, workers, rank, world)
    if name == "torch" and not from_shards(config):
        if data.download:
            sources.load(data.dataset, split, data.path, download=True, limit=1, resolution=resolution)
        found = sources.pictures(data.dataset, split, data.path, data.limit)
    else:
        found = read_records(config, "dali" if name == "torch" else name, split, size)
    if name == "torch":
        loader = Torch(found, size, *facts)
    elif name == "ffcv":
        from fastrobust.data.ffcv import Ffcv

        loader = Ffcv(found, *facts)
    else:
        from fastrobust.data.dali import Dali

        loader = Dali(found, *facts)
    loader.source, loader.checksum = found.source, found.checksum()
    return loader


def test_set(config: Config, limit: int | None) -> sources.ImageSet:
    """The test images, or `limit` of them, evenly spaced, at the resolution of the last phase: the square in the middle of
    each. From prepared files where the loader has some, else from the source."""
    data, resolution = config.data, config.phases[-1].resolution
    name = ready(config) if config.loader == "auto" else config.loader
    if name in READERS and (place := folder(config, name)) is not None:
        sizes = [m.stem.partition("_")[2] for m in sorted(place.glob("test_*.json"))]
        if sizes:
            size = "original" if "original" in sizes else max(map(int, sizes))
            changed = config.model_copy(update={"data": data.model_copy(update={"limit": limit})})
            loader = decoding(changed, name, "test", size, resolution, torch.device("cpu"))
            try:
                return loader.in_order()
            finally:
                loader.close()
    size = resolution if sources.DATASETS[data.dataset].size is None else None
    return sources.load(data.dataset, "test", data.path, resolution=size, download=data.download, limit=limit)
