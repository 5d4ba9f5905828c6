"""Which loader a run has, and the images that it gives.

A loader has `classes`, `channels`, a length, a `source` and its `checksum`, `crops` (whether its images come cropped and
mirrored at random; else the training step does it) and `batches(seed, phase, batch_size, first, last)`, which yields a
`Batch` for each. What `auto` stands for is decided once, by `resolve`, and stored with the run: no later command looks at
what happens to be installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fastrobust.config import parts
from fastrobust.config.schema import Config
from fastrobust.data import checking, layouts, packed, sets
from fastrobust.data.held_out import Choice, evenly_spaced
from fastrobust.data.prepared import beton, records, shards
from fastrobust.runtime import limits
from fastrobust.runtime.distributed import ALONE, World
from fastrobust.runtime.errors import ConfigError, DataError

READERS = {"ffcv": beton.read, "webdataset": shards.read}  # of each kind of prepared files
FAST = ("simplejpeg", "cv2", "numba")
PREPARED = {"ffcv": ("ffcv", FAST), "dali": ("webdataset", ("nvidia.dali", "numba"))}  # loader: its files, its packages


def resolve(config: Config, device: torch.device) -> Config:
    """The config with the loader that `auto` stands for (prepared files with ffcv or dali where these are installed, else
    what fits into memory, else torch), with the folder of the prepared files that it reads, and with the number of channels
    of the images. Paths are absolute. Raises ConfigError or DataError."""
    data, automatic = config.data, config.loader == "auto"
    if data.labels:
        data = data.model_copy(update={"labels": str(layouts.find_labels(data.labels, data.path))})
        config = config.model_copy(update={"data": data})
    name = _automatic(config, device) if automatic else config.loader
    kind = PREPARED[name][0] if name in PREPARED else None
    if automatic and name == "torch":  # shards where there are some, else the source
        kind = "webdataset" if prepared(config, "webdataset") else None
    if name == "torch" and not automatic and data.prepared:
        kind = "webdataset"
    place = None if kind is None else folder(config, kind)
    if kind is not None and place is None:
        raise ConfigError(f"loader: {name} reads prepared files: set data.prepared to the folder they were written to")
    if kind is not None:
        tell_of(place, [stored(config, phase) for phase in config.phases])
    if data.prepared and place is None and ":" not in name:
        readers = "ffcv or dali" if config.facts.size is None else "ffcv, dali or torch"
        print(f"note: data.prepared is not used: the loader is {name}, which reads the source; set loader: {readers}")
    if ":" not in name:
        data = data.model_copy(update={"prepared": place and str(place)})
    paths = {
        key: value and os.path.abspath(value) for key in ("path", "prepared", "labels") for value in [getattr(data, key)]
    }
    data = data.model_copy(update=paths)
    config = config.model_copy(update={"loader": name, "data": data})
    return config if config.facts.channels is not None else config.with_channels(_channels(config))


def _channels(config: Config) -> int:
    """1 where all files of a sample are grey; what is found is said. Prepared files hold colours: 3."""
    if kind_of_files(config):
        return 3
    data, choice = config.data, choice_of(config, None)._replace(held_out=0)
    splits = ["train", *(["test"] if sets.has_test_images(data.dataset, data.path, data.labels) else [])]
    found = [checking.grey_files(sets.list_images(data.dataset, split, data.path, choice).members) for split in splits]
    grey, looked = (sum(numbers) for numbers in zip(*found, strict=True))
    if grey and grey == looked:
        print(f"images: grey, 1 channel (all {looked:,} files looked at; data.channels=3 trains with 3)", flush=True)
        return 1
    if grey:
        print(f"images: 3 channels ({grey:,} of {looked:,} files looked at are grey, the others have colours)", flush=True)
    return 3


def choice_of(config: Config, limit: int | None) -> Choice:
    """Which images of the data set a config speaks of, or `limit` of them, evenly spaced."""
    data = config.data
    return Choice(limit, data.held_out, data.seed, data.labels, data.skip_corrupt, config.facts.channels or 3)


def _automatic(config: Config, device: torch.device) -> str:
    if config.facts.size is not None or config.facts.read is not None:
        return "resident"
    for name, (kind, _) in PREPARED.items():
        reason = why_not(config, kind)
        if reason:
            print(f"note: prepared files are not used: {reason}", flush=True)
        if reason is None and available(name):
            return name
    return "resident" if fits(config, device) else "torch"


def available(loader: str) -> bool:
    """Whether the packages that a loader needs are installed."""
    return loader not in PREPARED or all(map(installed, PREPARED[loader][1]))


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def stored(config: Config, phase) -> records.Size:
    """The size of the files that a phase reads."""
    return phase.resize if config.facts.size is None else "original"


def tell_of(place: Path, sizes: list[records.Size]) -> None:
    """Say so where files are of a part of the images, and where JPEGs were not made for partial decoding."""
    with contextlib.suppress(DataError):  # told where they are opened
        found = [records.read_manifest(place, "train", size) for size in sizes]
        if problem := next(filter(None, map(not_whole, found)), None):
            print(f"note: the prepared training images in {place} {problem}", flush=True)
        if any(one["format"] < records.MANIFEST_FORMAT and one.get("storage") != "raw" for one in found):
            told = f"note: {place} was written by an older version, so that images are decoded whole"
            print(f"{told}: written again with --overwrite they load up to twice as fast", flush=True)


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
    if len(found) == len(config.phases) and test_split(config, place) == "test":
        return f"{place} holds no test images"
    if config.data.held_out and (problem := not_whole(found[0].manifest)):
        return f"data.held_out needs all training images, and those in {place} {problem}"
    source = functools.cache(lambda split: _source(config, split))
    problems = [problem for one in found if (problem := _not_all(one, source))]
    return f"those in {place}: {problems[0]}" if problems else None


def _source(config: Config, split: str) -> sets.Pictures | None:
    """All images of a split, if the source is still there."""
    every = choice_of(config, None)._replace(held_out=0)
    try:
        return sets.pictures_of(sets.list_images(config.data.dataset, split, config.data.path, every))
    except DataError:
        return None


def _not_all(found: records.Records, source: Callable[[str], sets.Pictures | None]) -> str | None:
    """Why prepared images are not all of their split's."""
    manifest = found.manifest
    if manifest["dataset"] is None:  # FFCV's own file: nothing says which source it is of
        return None
    if manifest["limit"] is not None:
        return f"they were written with --limit {manifest['limit']}"
    if (every := source(manifest["split"])) is None:
        return None
    count = manifest["count"] + len(manifest["skipped"])
    if (len(every.labels), every.classes) != (count, found.classes):
        return f"the source has {len(every.labels)} {manifest['split']} images now, {count} when they were written"
    same = "fingerprint" not in manifest or manifest["fingerprint"] == every.fingerprint()  # older files have none
    if not same or (not manifest["skipped"] and (found.label != every.labels).any()):
        return f"the source has other {manifest['split']} images or labels now than when they were written"
    return None


def sizes_of(place: Path, split: str) -> list[records.Size]:
    """The sizes in which a split was written, the best first; FFCV's own files have one."""
    if beton.by_ffcv(place):
        return (
            ["original"] if split in {layouts.side_name(side) for side in packed.by_side(tuple(packed.files(place)))} else []
        )
    sizes = [m.stem.partition("_")[2] for m in sorted(place.glob(f"{split}_*.json"))]
    whole = sorted((int(size) for size in sizes if size.isdecimal()), reverse=True)
    return [*(["original"] if "original" in sizes else []), *whole]


def fits(config: Config, device: torch.device) -> bool:
    """Whether the largest phase's images take less than half of the memory that they would live in."""
    if any(phase.resize == "original" for phase in config.phases):
        return False
    choice = choice_of(config, config.data.limit)
    count = len(sets.list_images(config.data.dataset, "train", config.data.path, choice).labels)
    needed = max(count * phase.resize**2 * choice.channels for phase in config.phases)
    free = limits.available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    return needed < free / 2


def read_records(config: Config, kind: str, split: str, size: records.Size, limit: int | None) -> records.Records:
    """A split's prepared images, or `limit` of them: see `Choice.of`. Where some are held out, files of a part of the
    training images are refused: they would number them otherwise than the source does. Raises DataError or ConfigError."""
    place = folder(config, kind)
    found = READERS[kind](place, "test" if split == "test" else "train", size)
    if found.manifest["dataset"] is None:
        found = with_names(found, config)
    elif found.manifest["dataset"] != config.data.dataset:
        raise ConfigError(f"{place} holds {found.manifest['dataset']}, not {config.data.dataset}: set data.prepared")
    if config.data.held_out and split != "test" and (problem := not_whole(found.manifest)):
        raise DataError(f"data.held_out needs all training images, and those in {place} {problem}: write them anew")
    keep = choice_of(config, limit).of(found.labels, split, found.classes)
    return found if len(keep) == len(found) else found.take(keep)


def with_names(found: records.Records, config: Config) -> records.Records:
    """Images of FFCV's own file with the names of the data set's classes, where these are fixed. Raises DataError."""
    names = config.facts.classes
    if names is None or found.classes == names:
        return found
    if found.classes != tuple(map(str, range(len(found.classes)))) or len(found.classes) > len(names):
        raise DataError(f"{found.source} has other classes than {config.data.dataset}: {', '.join(found.classes[:5])}, …")
    return replace(found, classes=names)


def not_whole(manifest: dict) -> str | None:
    """Why prepared files are of a part of their split's images only, if they are."""
    if manifest["limit"] is not None:
        return f"were written with --limit {manifest['limit']}"
    return f"lack {len(manifest['skipped'])} that were skipped" if manifest["skipped"] else None


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
        self.bad: dict[int, str] | None = None  # images that cannot be decoded, where they are read one by one
        for index, phase in enumerate(config.phases):
            key, parts = f"phases.{index}.batch_size is {phase.batch_size}", phase.accumulate
            if phase.batch_size % world.size:
                raise ConfigError(f"{key}: {world.size} processes cannot share it equally")
            if parts > phase.batch_size // world.size:
                each = f"the {phase.batch_size // world.size} of each process" if world.joined else "that"
                raise ConfigError(f"{key}: accumulate asks for {parts} parts of {each}")

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
            self.check_images()
            self.loader.balanced = self.config.data.balance
        if len(self.loader) < phase.batch_size:
            there = f"there are only {len(self.loader)} images"
            raise ConfigError(f"phases.{index}.batch_size is {phase.batch_size}, but {there}")
        return self.loader

    def check_images(self) -> None:
        """Look at all images once, if they are read one by one: those that cannot be decoded are left out as
        `data.skip_corrupt` says, or raised as Unusable. Images in memory have been decoded, prepared ones when written."""
        data = getattr(self.loader, "data", None)
        if not getattr(data, "members", None):
            return
        if self.bad is None:

            def look() -> dict[int, str]:
                return checking.left_out(data.members, self.config.data.skip_corrupt)

            self.bad = self.world.first(look) if self.world.joined else look()
            if self.bad:
                sets.tell_skipped(list(self.bad.values()), "train")
        if self.bad:
            self.loader.leave_out(self.bad)

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


def digest(config: Config) -> str | None:
    """A digest of a config's prepared training images, of which some are held out: the same where they were written anew
    from the same source. None where none are held out of prepared files."""
    kind, place = kind_of_files(config), config.data.prepared
    if not config.data.held_out or kind is None or place is None:
        return None
    found = READERS[kind](Path(place), "train", stored(config, config.phases[0]))
    return found.manifest.get("fingerprint") or found.checksum()


def still(config: Config, split: str, limit: int | None) -> sets.ImageSet:
    """The images of a split of a resolved config, or `limit` of them (see `Choice.of`), at the resolution of the last
    phase: the square in the middle of each. Training images are those that `data.limit` leaves. If the run trains from
    prepared files, these are read from prepared files too. Raises DataError."""
    data, resolution = config.data, config.phases[-1].resolution
    if split == "train" and data.limit is not None and limit is not None:
        trained = still(config, split, None)
        return trained.take(evenly_spaced(len(trained.labels), limit))
    limit = limit or (data.limit if split == "train" else None)
    kind = kind_of_files(config)
    if kind is None:
        return load(config, split, resolution, limit)
    place = folder(config, kind)
    sizes = sizes_of(place, "test" if split == "test" else "train")
    if not sizes:
        advice = f"write them with --splits {split}, or read the source's with --data PATH"
        raise DataError(f"{place} holds no prepared {split} images: {advice}")
    changed = config.model_copy(update={"data": data.model_copy(update={"limit": limit})})
    loader = class_of(config).open(changed, split, sizes[0], resolution, torch.device("cpu"))
    try:
        found = loader.in_order()
    finally:
        loader.close()
    told = f"{found.source}, {len(found.labels)} held-out training images" if split == "held_out" else found.source
    whole = READERS[kind](place, "test" if split == "test" else "train", sizes[0])
    keep = choice_of(config, limit).of(whole.labels, split, found.classes)
    return replace(found, source=told, numbers=None if len(keep) == len(whole) else torch.from_numpy(keep))


def load(config: Config, split: str, size: int, limit: int | None) -> sets.ImageSet:
    """The source's images of a split, or `limit` of them, as squares of this side. Raises DataError."""
    data, side = config.data, size if config.facts.size is None else None
    choice = choice_of(config, limit)
    return sets.load(data.dataset, split, data.path, resolution=side, download=data.download, choice=choice)


def test_split(config: Config, place: Path | None = None) -> str:
    """Which images a run is tested on: "test", or "held_out" where the data set comes without test images. place: the
    folder of the prepared files. Raises DataError."""
    data, kind = config.data, kind_of_files(config)
    place = place or (folder(config, kind) if kind else None)
    if not data.held_out or (place is not None and sizes_of(place, "test")):
        return "test"
    try:
        return "test" if sets.has_test_images(data.dataset, data.path, data.labels) else "held_out"
    except DataError:  # a download is still to come, or the source is no longer where its prepared files are
        return "test" if place is None else "held_out"


def test_set(config: Config, limit: int | None) -> sets.ImageSet:
    """The test images of a resolved config, see `still`; a note says so where they are held-out training images."""
    split = test_split(config)
    found = still(config, split, limit)
    if split == "held_out":
        print(f"note: test images: {in_words(config, len(found.labels))}", flush=True)
    return found


def in_words(config: Config, count: int) -> str:
    """What so many test images of a config are."""
    return f"{count} held-out training images" if test_split(config) == "held_out" else f"{count} test images"


def from_source(config: Config, path: str | None) -> Config:
    """The config with its data set read from `path`, whatever prepared files there are: what `--data PATH` means. Raises
    DataError."""
    labels = config.data.labels
    if labels and path and (Path(path) / Path(labels).name).is_file():
        labels = str(Path(path) / Path(labels).name)
    if config.data.held_out and kind_of_files(config) and not sets.has_test_images(config.data.dataset, path, labels):
        raise DataError(f"{path} holds no test images, and the run's are held out of its prepared files: leave out --data")
    data = config.data.model_copy(update={"path": path, "prepared": None, "labels": labels})
    return config.model_copy(update={"data": data, "loader": "resident"})
