"""Tests of the choice of a run's loader, of what it reads, and of the test images that belong to it."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from loader_batches import CPU, RANDOM, config_for
from prepared_files import write

from fastrobust.config import reading
from fastrobust.data import loaders, sets
from fastrobust.data.held_out import evenly_spaced
from fastrobust.data.loaders.ffcv import functions
from fastrobust.data.prepared import beton, records
from fastrobust.data.prepared.records import Records
from fastrobust.data.sets import Pictures
from fastrobust.runtime.distributed import World
from fastrobust.runtime.errors import ConfigError, DataError, FastrobustError

ORIGINAL = {"phases": [{"epochs": 1, "batch_size": 8, "resolution": 32, "resize": "original"}]}
NOT_WRITTEN = {"phases": [{"epochs": 1, "batch_size": 8, "resolution": 32, "resize": 99}]}


@pytest.fixture
def resolved(photos, tmp_path, monkeypatch):
    """resolved(packages, **changes) -> the resolved config of a run on the photos, where these packages are installed."""
    monkeypatch.setenv("FASTROBUST_DATA", str(tmp_path))

    def make(packages=(), **changes):
        monkeypatch.setattr(loaders, "installed", lambda package: package in packages)
        return loaders.resolve(config_for(photos, **changes), CPU)

    return make


def little_memory(monkeypatch):
    monkeypatch.setattr(loaders.limits, "available_memory", lambda: 37 * 64**2 * 3 * 2)


def test_auto_takes_what_is_there(resolved, written, monkeypatch):
    assert resolved().loader == "resident"
    assert resolved(**ORIGINAL).loader == "torch"
    little_memory(monkeypatch)
    assert resolved().loader == "torch"
    both = (*loaders.FAST, "nvidia.dali")
    for kind in ("ffcv", "dali"):
        place = str(written / "jpeg" / f"x-{kind}")
        found = resolved(both, data={"prepared": place})
        assert found.loader == kind and found.data.prepared == place
        assert resolved(both, data={"prepared": place}, **NOT_WRITTEN).loader == "torch"
        assert resolved((), data={"prepared": place}).loader == "torch"
        assert resolved((), data={"prepared": place}, loader=kind).loader == kind  # named: an error where it is opened


@pytest.mark.parametrize("fingerprint", [True, False], ids=["", "as older files are"])
@pytest.mark.parametrize("change", ["folders", "files", "one class"])
def test_auto_takes_no_files_of_other_images_or_labels(photos, tmp_path, monkeypatch, capsys, change, fingerprint):
    """The same number of images and the same classes are not enough."""
    source, place = tmp_path / "source", tmp_path / "x-ffcv"
    shutil.copytree(photos, source)
    write("ffcv", source, place, "--sizes", "64")
    if not fingerprint:
        for file in place.glob("*.json"):
            manifest = {key: value for key, value in json.loads(file.read_text()).items() if key != "fingerprint"}
            file.write_text(json.dumps(records.seal({key: v for key, v in manifest.items() if key != "sha256"})))
    monkeypatch.setattr(loaders, "installed", lambda package: package in loaders.FAST)
    config = config_for(source, data={"prepared": str(place)})
    assert loaders.resolve(config, CPU).loader == "ffcv" and "not used" not in capsys.readouterr().out
    first, second = sorted((source / "train").iterdir())[:2]
    if change == "folders":
        first.rename(source / "x"), second.rename(first), (source / "x").rename(second)
    elif change == "files":  # the same names and labels
        one, other = next(first.iterdir()), next(second.iterdir())
        content = one.read_bytes()
        one.write_bytes(other.read_bytes()), other.write_bytes(content)
    else:
        file = sorted(first.iterdir())[0]
        file.rename(second / f"z{file.name}")
    seen = fingerprint or change != "files"
    assert loaders.resolve(config, CPU).loader == ("resident" if seen else "ffcv")
    assert ("the source has other train images or labels now" in capsys.readouterr().out) == seen
    if fingerprint:
        with pytest.raises(ConfigError, match="was written from other images: replace it with --overwrite"):
            write("ffcv", source, place, "--sizes", "64")


def test_what_auto_chose_is_whole_and_chosen_once(resolved, written, monkeypatch):
    """A resolved config says which files are read, whatever is installed later."""
    little_memory(monkeypatch)
    for kind in ("ffcv", "dali"):
        found = resolved((*loaders.FAST, "nvidia.dali"), data={"prepared": str(written / "jpeg" / f"x-{kind}")})
        monkeypatch.setattr(loaders, "installed", lambda package: False)
        assert loaders.resolve(found, CPU) == found
    shards = resolved((), data={"prepared": str(written / "jpeg" / "x-dali")})
    assert shards.loader == "torch" and shards.data.prepared == str(written / "jpeg" / "x-dali")
    assert isinstance(loaders.Phases(shards, CPU).enter(0).data, Records)
    for other in (written / "jpeg" / "x-ffcv", written / "absent"):  # files that torch cannot read
        source = resolved((), data={"prepared": str(other)})
        assert source.loader == "torch" and source.data.prepared is None
        assert isinstance(loaders.Phases(source, CPU).enter(0).data, Pictures)
    assert loaders.resolve(source, CPU) == source


def test_prepared_files_are_found_beside_the_data_sets(written, photos, tmp_path, monkeypatch):
    """Where the config names neither the data nor the prepared files; named data is not that of the prepared files."""
    monkeypatch.setenv("FASTROBUST_DATA", str(tmp_path))
    monkeypatch.setattr(loaders, "installed", lambda package: True)
    (tmp_path / "image_folder-dali").symlink_to(written / "jpeg" / "x-dali")
    config = config_for(photos, data={"path": None})
    found = loaders.resolve(config, CPU)
    assert found.loader == "dali" and found.data.prepared == str(tmp_path / "image_folder-dali")
    (tmp_path / "image_folder-ffcv").symlink_to(written / "jpeg" / "x-ffcv")
    assert loaders.resolve(config, CPU).loader == "ffcv"
    assert loaders.resolve(config_for(photos), CPU).loader == "resident"


def test_small_images_are_always_resident(tmp_path):
    data = {"dataset": "cifar10", "path": str(tmp_path / "absent")}
    phases = [{"epochs": 1, "batch_size": 8}]
    found = loaders.resolve(config_for(tmp_path, data=data, phases=phases), CPU)
    assert found.loader == "resident" and found.data.prepared is None


def test_torch_reads_the_source_unless_shards_are_named(resolved, written):
    plain = loaders.Phases(resolved(loader="torch"), CPU).enter(0)
    assert isinstance(plain.data, Pictures)
    shards = loaders.Phases(resolved(loader="torch", data={"prepared": str(written / "jpeg" / "x-dali")}), CPU).enter(0)
    assert isinstance(shards.data, Records) and len(shards) == len(plain) == 37
    with pytest.raises(DataError, match="holds ffcv files, not webdataset"):
        loaders.Phases(resolved(loader="torch", data={"prepared": str(written / "jpeg" / "x-ffcv")}), CPU).enter(0)


def test_phases_of_one_key_share_a_loader(resolved):
    sizes = [(16, 64), (32, 64), (32, 64), (32, 48)]
    phases = [{"epochs": 1, "batch_size": 8, "resolution": a, "resize": b} for a, b in sizes]
    for name, expected in (("resident", [0, 0, 0, 1]), ("torch", [0, 1, 1, 2])):
        run = loaders.Phases(resolved(loader=name, phases=phases), CPU)
        entered = [run.enter(index) for index in range(4)]
        kinds = list(dict.fromkeys(map(id, entered)))
        assert [kinds.index(id(loader)) for loader in entered] == expected
        run.close()


def test_what_cannot_be_loaded_is_explained(resolved, written, tmp_path, monkeypatch):
    data = {"prepared": str(written / "jpeg" / "x-ffcv")}
    with pytest.raises(ConfigError, match=r"loader: ffcv reads prepared files: set data\.prepared to the folder"):
        resolved(loader="ffcv")
    with pytest.raises(DataError, match=r"train_64\.json does not exist"):
        loaders.Phases(resolved(loader="ffcv", data={"prepared": str(tmp_path)}), CPU).enter(0)
    with pytest.raises(ConfigError, match="holds image_folder, not imagenet"):
        loaders.Phases(resolved(loader="ffcv", data={"dataset": "imagenet", **data}), CPU).enter(0)
    with pytest.raises(ConfigError, match=r"phases\.0\.batch_size is 8: 3 processes cannot share it"):
        loaders.Phases(resolved(loader="ffcv", data=data), CPU, World(0, 3))
    with pytest.raises(ConfigError, match=r"phases\.0\.batch_size is 8, but there are only 5 images"):
        loaders.Phases(resolved(loader="torch", data={"limit": 5}), CPU).enter(0)
    with pytest.raises(ConfigError, match="resident holds squares of one size"):
        loaders.Phases(resolved(loader="resident", **ORIGINAL), CPU).enter(0)
    whole = loaders.Phases(resolved(loader="ffcv", data=data), CPU)
    whole.check_files(37)
    with pytest.raises(DataError, match="holds 37 images, the first phase's file 36"):
        whole.check_files(36)
    functions.cache_clear()
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(FastrobustError, match=r"ffcv needs a package that does not load \(.*simplejpeg.*`pip install"):
        functions()
    functions.cache_clear()


def test_limit_takes_an_even_part(resolved, written):
    config = resolved(loader="ffcv", data={"prepared": str(written / "jpeg" / "x-ffcv"), "limit": 10})
    found = loaders.read_records(config, "ffcv", "train", 64, 10)
    whole = beton.read(written / "jpeg" / "x-ffcv", "train", 64)
    even = evenly_spaced(37, 10)
    assert found.offset.tolist() == whole.offset[even].tolist()
    assert json.dumps(found.manifest) == json.dumps(whole.manifest)
    loaders.Phases(config, CPU).check_files(10)  # `data.limit` counts
    assert len(loaders.read_records(config, "ffcv", "train", 64, None)) == 37
    for name in ("torch", "resident"):
        loader = loaders.Phases(resolved(loader=name, data={"limit": 10}), CPU).enter(0)
        assert loader.labels.tolist() == whole.label[even].tolist()


# ---- the test images


@pytest.mark.parametrize("name", ["torch", "dali", "ffcv"])
def test_test_images_come_from_what_the_run_trains_from(resolved, made, written, photos, name):
    place = written / "jpeg" / ("x-ffcv" if name == "ffcv" else "x-dali")
    loader = made(name, "original", 32, None, split="test")
    config = resolved(loader=name, data={"prepared": str(place), "limit": 3})  # of the training images
    expected = loader.in_order()
    found = loaders.test_set(config, None)
    assert torch.equal(found.images, expected.images) and torch.equal(found.labels, expected.labels)
    assert len(found.labels) == 12 and found.source == str(loader.data.files[0]) and found.classes == ("a", "b", "c")
    part, even = loaders.test_set(config, 5), evenly_spaced(12, 5)
    assert torch.equal(part.images, expected.images[even]) and torch.equal(part.labels, expected.labels[even])
    training, whole = loaders.still(config, "train", 4), made(name, "original", 32, None).in_order()
    assert torch.equal(training.images, whole.images[evenly_spaced(37, 3)]), "the run was trained on these"
    source = sets.load("image_folder", "test", photos, resolution=32)
    again = loaders.test_set(loaders.from_source(config, str(photos)), None)
    assert torch.equal(again.images, source.images) and again.source == str(photos)
    assert not torch.equal(again.images, expected.images)


def test_without_prepared_files_test_images_are_the_sources(resolved, photos):
    source = sets.load("image_folder", "test", photos, resolution=32)
    for name in ("torch", "resident"):
        found = loaders.test_set(resolved(loader=name, data={"limit": 3}), None)
        assert torch.equal(found.images, source.images) and found.classes == source.classes
        part = loaders.test_set(resolved(loader=name), 5)
        assert torch.equal(part.images, source.images[evenly_spaced(12, 5)])


def test_prepared_files_without_test_images(resolved, written, tmp_path):
    for file in (written / "jpeg" / "x-ffcv").glob("train*"):
        (tmp_path / file.name).symlink_to(file)
    config = resolved(loader="ffcv", data={"prepared": str(tmp_path)})
    with pytest.raises(DataError, match=r"no prepared test images: write them with --splits test, or .* --data PATH"):
        loaders.test_set(config, None)


def test_training_images_are_mirrored_and_cropped_only_in_training(made):
    """The same loader class for both: with no augmentation it gives squares in the middle."""
    loader = made("torch from the source", augment=RANDOM)
    assert loader.crops and loader.flip
    still = made("torch from the source", augment=None)
    assert not still.crops and not still.flip
    batch = next(still.batches(0, 0, 37, 0, 1))
    assert torch.equal(batch.images, still.in_order().images[batch.index])


def test_a_stored_config_is_read_back_resolved(resolved, written):
    found = resolved(loaders.FAST, data={"prepared": str(written / "jpeg" / "x-ffcv")})
    assert found.loader == "ffcv" and reading.parse(found.to_dict(), "stored") == found
    assert np.array_equal(loaders.Phases(found, CPU).enter(0).labels, np.repeat([0, 1, 2], [13, 12, 12]))


def test_a_note_says_that_prepared_files_are_not_read(resolved, written, tmp_path, capsys):
    """Whatever chose a loader that reads the source."""
    place = str(written / "jpeg" / "x-dali")
    small = {"dataset": "mnist", "path": None, "prepared": place, "augment": {"crop": "none"}}
    cases = [
        {"data": small, "model": {"name": "mnist_net"}, "phases": [{"epochs": 1, "batch_size": 8}]},
        {"loader": "resident", "data": {"prepared": place}},
    ]
    for changes in cases:
        config = resolved(**changes)
        assert config.loader == "resident" and config.data.prepared is None
        assert "note: data.prepared is not used: the loader is resident" in capsys.readouterr().out
    assert resolved(loader="torch", data={"prepared": place}).data.prepared == place
    assert "not used" not in capsys.readouterr().out
