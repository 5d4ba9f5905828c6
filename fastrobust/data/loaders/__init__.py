"""Which loader a run has, and the images that it gives.

A loader has `classes`, `channels`, a length, a `source` and its `checksum`, `crops` (whether its images come cropped and
mirrored at random; else the training step does it) and `batches(seed, phase, batch_size, first, last)`, which yields a
`Batch` for each. What `auto` stands for is decided once, by `resolve`, and stored with the run: no later command looks at
what happens to be installed.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import torch

from fastrobust.config import parts
from fastrobust.config.schema import Config
from fastrobust.data import sets
from fastrobust.data.prepared import beton, records, shards
from fastrobust.runtime import limits
from fastrobust.runtime.distributed import ALONE, World
from fastrobust.runtime.errors import ConfigError, DataError

READERS = {"ffcv": beton.read, "webdataset": shards.read}  # of each kind of prepared files
PREPARED = {"ffcv": ("ffcv", "ffcv"), "dali": ("webdataset", "nvidia.dali")}  # loader: the files that it reads, its package


def resolve(config: Config, device: torch.device) -> Config:
    """The config with the loader that `auto` stands for (prepared files with ffcv or dali where these are installed, else
    what fits into memory, else torch) and with the folder of the prepared files that it reads. Paths are absolute. Raises
    ConfigError."""
    data, automatic = config.data, config.loader == "auto"
    name = _automatic(config, device) if automatic else config.loader
    kind = PREPARED[name][0] if name in PREPARED else None
    if automatic and name == "torch":  # shards where there are some, else the source
        kind = "webdataset" if prepared(config, "webdataset") else None
        data = data.model_copy(update={"prepared": None})
    if kind is not None:
        place = folder(config, kind)
        if place is None:
            raise ConfigError(f"loader: {name} reads prepared files: set data.prepared to the folder they were written to")
        data = data.model_copy(update={"prepared": str(place)})
    paths = {key: value and os.path.abspath(value) for key in ("path", "prepared") for value in [getattr(data, key)]}
    data = data.model_copy(update=paths)
    return config.model_copy(update={"loader": name, "data": data})


def _automatic(config: Config, device: torch.device) -> str:
    if config.facts.size is not None or config.facts.read is not None:
        return "resident"
    for name, (kind, package) in PREPARED.items():
        reason = why_not(config, kind)
        if reason:
            print(f"note: prepared files are not used: {reason}", flush=True)
        if reason is None and installed(package):
            return name
    return "resident" if fits(config, device) else "torch"


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def stored(config: Config, phase) -> records.Size:
    """The size of the files that a phase reads."""
    return phase.resize if config.facts.size is None else "original"


def folder(config: Config, kind: str) -> Path | None:
    """Where prepared files of a kind are, if the config lets that be known."""
    if config.data.prepared:
        return Path(config.data.prepared).expanduser()
    return records.prepared_folder(config.data.dataset, kind) if config.data.path is None else None


def prepared(config: Config, kind: str) -> bool:
    """Whether prepared files of all phases and of the test images are there, and are the config's images."""
    return why_not(config, kind) is None


def why_not(config: Config, kind: str) -> str | None:
    """Why prepared files are not the config's images: none are there (an empty reason), they are a trial with a few of them,
    or of a source that has changed since. None if they are."""
    place = folder(config, kind)
    if place is None:
        return ""
    try:
        found = [READERS[kind](place, "train", stored(config, phase)) for phase in config.phases]
        found += [READERS[kind](place, "test", size) for size in sizes_of(place, "test")[:1]]
    except DataError:
        return ""
    if len(found) == len(config.phases):
        return f"{place} holds no test images"
    problems = [problem for one in found if (problem := _not_all(config, one))]
    return f"those in {place}: {problems[0]}" if problems else None


def _not_all(config: Config, found: records.Records) -> str | None:
    """Why prepared images are not all of their split's."""
    manifest = found.manifest
    if manifest["limit"] is not None:
        return f"they were written with --limit {manifest['limit']}"
    try:
        listing = sets.list_images(config.data.dataset, manifest["split"], config.data.path)
    except DataError:
        return None  # the source is no longer there
    count = manifest["count"] + len(manifest["skipped"])
    if (len(listing.labels), listing.classes) != (count, found.classes):
        return f"the source has {len(listing.labels)} {manifest['split']} images now, {count} when they were written"
    return None


def sizes_of(place: Path, split: str) -> list[records.Size]:
    """The sizes in which a split was written, the best first."""
    sizes = [m.stem.partition("_")[2] for m in sorted(place.glob(f"{split}_*.json"))]
    whole = sorted((int(size) for size in sizes if size.isdecimal()), reverse=True)
    return [*(["original"] if "original" in sizes else []), *whole]


def fits(config: Config, device: torch.device) -> bool:
    """Whether the largest phase's images take less than half of the memory that they would live in."""
    if any(phase.resize == "original" for phase in config.phases):
        return False
    count = len(sets.list_images(config.data.dataset, "train", config.data.path, config.data.limit).labels)
    needed = max(count * phase.resize**2 * 3 for phase in config.phases)
    free = limits.available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    return needed < free / 2


def read_records(config: Config, kind: str, split: str, size: records.Size, limit: int | None) -> records.Records:
    """A split's prepared images, or `limit` of them: see `sets.chosen`. Raises DataError or ConfigError."""
    place = folder(config, kind)
    found = READERS[kind](place, split, size)
    if found.manifest["dataset"] != config.data.dataset:
        raise ConfigError(f"{place} holds {found.manifest['dataset']}, not {config.data.dataset}: set data.prepared")
    return found if limit is None else found.take(sets.chosen(found.labels, found.classes, split, limit))


def kind_of_files(config: Config) -> str | None:
    """The kind of prepared files that a resolved config's loader reads; None where it reads the source."""
    kind = PREPARED.get(config.loader, (None,))[0]
    return "webdataset" if config.loader == "torch" and config.data.prepared else kind


def class_of(config: Config) -> type:
    """The class of a resolved config's loader. Raises ConfigError."""
    return parts.find_class("loader", parts.LOADERS, config.loader)


class Phases:
    """The loaders of a run's phases, one at a time: `enter(index)` gives the one of a phase. `config` is a resolved one.
    Raises ConfigError or DataError."""

    def __init__(self, config: Config, device: torch.device, world: World = ALONE):
        self.config, self.device, self.world = config, device, world
        self.kind = class_of(config)
        self.key, self.loader = None, None
        for index, phase in enumerate(config.phases):
            if phase.batch_size % world.size:
                key = f"phases.{index}.batch_size is {phase.batch_size}"
                raise ConfigError(f"{key}: {world.size} processes cannot share it equally")

    def enter(self, index: int):
        phase = self.config.phases[index]
        key = self.kind.key(phase)
        if key != self.key:
            if self.loader is not None:
                self.loader.close()
            size = stored(self.config, phase)
            with self.world.one_after_the_other(self.config.data.download):
                self.loader = self.kind.open(self.config, "train", size, phase.resolution, self.device, self.world)
            self.key = key
        if len(self.loader) < phase.batch_size:
            there = f"there are only {len(self.loader)} images"
            raise ConfigError(f"phases.{index}.batch_size is {phase.batch_size}, but {there}")
        return self.loader

    def check_files(self, examples: int) -> None:
        """Raise DataError unless the prepared files of all phases hold `examples` images."""
        if (kind := kind_of_files(self.config)) is not None:
            for phase in self.config.phases:
                found = read_records(self.config, kind, "train", stored(self.config, phase), self.config.data.limit)
                if len(found) != examples:
                    counts = f"{found.files[0]} holds {len(found)} images, the first phase's file {examples}"
                    raise DataError(f"{counts}: write both anew")

    def close(self) -> None:
        if self.loader is not None:
            self.loader.close()


def still(config: Config, split: str, limit: int | None) -> sets.ImageSet:
    """The images of a split of a resolved config, or `limit` of them (see `sets.chosen`), at the resolution of the last
    phase: the square in the middle of each. Training images are those that `data.limit` leaves. If the run trains from
    prepared files, these are read from prepared files too. Raises DataError."""
    data, resolution = config.data, config.phases[-1].resolution
    if split == "train" and data.limit is not None and limit is not None:
        trained = still(config, split, None)
        return trained.take(sets.evenly_spaced(len(trained.labels), limit))
    limit = limit or (data.limit if split == "train" else None)
    kind = kind_of_files(config)
    if kind is None:
        size = resolution if config.facts.size is None else None
        return sets.load(data.dataset, split, data.path, resolution=size, download=data.download, limit=limit)
    place = folder(config, kind)
    sizes = sizes_of(place, split)
    if not sizes:
        advice = f"write them with --splits {split}, or read the source's with --data PATH"
        raise DataError(f"{place} holds no prepared {split} images: {advice}")
    changed = config.model_copy(update={"data": data.model_copy(update={"limit": limit})})
    loader = class_of(config).open(changed, split, sizes[0], resolution, torch.device("cpu"))
    try:
        found = loader.in_order()
    finally:
        loader.close()
    whole = read_records(config, kind, split, sizes[0], None)
    keep = sets.chosen(whole.labels, whole.classes, split, limit)
    return found if len(keep) == len(whole) else replace(found, numbers=torch.from_numpy(keep))


def test_set(config: Config, limit: int | None) -> sets.ImageSet:
    """The test images of a resolved config: see `still`."""
    return still(config, "test", limit)


def from_source(config: Config, path: str | None) -> Config:
    """The config with its data set read from `path`, whatever prepared files there are: what `--data PATH` means."""
    data = config.data.model_copy(update={"path": path, "prepared": None})
    return config.model_copy(update={"data": data, "loader": "resident"})
