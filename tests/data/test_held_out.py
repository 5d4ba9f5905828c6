"""Tests of which images are held out from training, and that no loader gives one of them to a training."""

import numpy as np
import pytest
from conftest import write_photos
from data_files import image_set, need, write_files
from loader_batches import CPU, config_for
from prepared_files import write

from fastrobust.data import loaders, sets
from fastrobust.data.held_out import Choice, held_out
from fastrobust.runtime.errors import DataError

LABELS = np.array([0] * 40 + [1] * 7 + [2] * 60)


def slow(labels, count, seed):
    """One image of each class in turn, those with the smallest draws first, as long as a class keeps half of its own."""
    draws = np.random.Philox(key=seed).random_raw(len(labels))
    queues = {}
    for label in set(labels.tolist()):
        of_class = sorted(np.flatnonzero(labels == label).tolist(), key=lambda i: draws[i])
        queues[label] = of_class[: len(of_class) // 2]
    chosen = []
    while len(chosen) < count:
        heads = [queue.pop(0) for queue in queues.values() if queue]
        chosen += sorted(heads, key=lambda i: draws[i])[: count - len(chosen)]
    return sorted(chosen)


@pytest.mark.parametrize("count", [1, 2, 9, 10, 40, 53])
def test_they_are_drawn_evenly_over_the_classes(count):
    for seed in (0, 5):
        assert held_out(LABELS, count, seed).tolist() == slow(LABELS, count, seed)
    assert np.bincount(LABELS[held_out(LABELS, 9, 0)]).tolist() == [3, 3, 3]


def test_they_are_the_same_on_every_machine_others_with_another_seed_and_more_with_a_larger_number():
    assert held_out(LABELS, 6, 0).tolist() == [0, 38, 43, 44, 54, 66]
    assert set(held_out(LABELS, 6, 0)) != set(held_out(LABELS, 6, 1))
    assert set(held_out(LABELS, 6, 0)) < set(held_out(LABELS, 30, 0))


def test_no_class_gives_more_than_half():
    with pytest.raises(DataError, match=r"data.held_out is 54, but at most 53 of the 107 training images can be"):
        held_out(LABELS, 54, 0)


def test_the_rest_is_trained_on_and_a_limit_changes_nothing_of_what_is_held_out():
    choice = Choice(held_out=20, seed=3)
    rest, held = choice.of(LABELS, "train", range(10)), choice.of(LABELS, "held_out", range(10))
    assert sorted([*rest, *held]) == list(range(107)) and len(held) == 20
    few = choice._replace(limit=10)
    assert set(few.of(LABELS, "train", range(10))) < set(rest) and len(few.of(LABELS, "train", range(10))) == 10
    assert choice.of(LABELS, "test", range(10)).tolist() == list(range(107))


@pytest.fixture(scope="module")
def no_test(tmp_path_factory):
    """24 training photos without test images, and their prepared files."""
    root = tmp_path_factory.mktemp("no_test")
    write_photos(root / "source", 24, 0)
    for kind in ("ffcv", "dali"):
        write(kind, root / "source", root / kind, "--sizes", "original", "--storage", "raw", "--splits", "train")
    return root


@pytest.mark.parametrize("name", ["resident", "torch", "torch from shards", "ffcv", "dali"])
def test_no_loader_trains_on_them_and_they_are_the_test_images(no_test, name, capsys):
    """Every image is known by its pixels: what a loader trains on and what it is tested on is all that there is, once."""
    need(name)
    files = {"ffcv": "ffcv", "dali": "dali", "torch from shards": "dali"}.get(name)
    size = {"resize": "original"} if name != "resident" else {"resize": 32}
    changes = {
        "loader": name.partition(" ")[0],
        "data": {"held_out": 6, "workers": 1, **({"prepared": str(no_test / files)} if files else {})},
        "phases": [{"epochs": 1, "batch_size": 6, "resolution": 32, **size}],
    }
    config = loaders.resolve(config_for(no_test / "source", **changes), CPU)
    phases = loaders.Phases(config, CPU)
    loader = phases.enter(0)
    trained = sorted(i for batch in loader.batches(0, 0, 6, 0, 3) for i in batch.index.tolist())
    assert trained == list(range(18)) and len(loader) == 18
    pixels = [image.numpy().tobytes() for image in loader.still(np.arange(18)).images]
    test = loaders.test_set(config, None)
    assert "test images: 6 held-out training images" in capsys.readouterr().out
    assert "6 held-out training images" in test.source and test.labels.bincount().tolist() == [2, 2, 2]
    phases.close()
    if name == "torch":  # it resizes otherwise than what reads the test images
        assert len({*loader.names, *test.names}) == 24 and len(test.names) == 6
        return
    every = loaders.still(config.model_copy(update={"data": config.data.model_copy(update={"held_out": 0})}), "train", None)
    seen = sorted([*pixels, *(image.numpy().tobytes() for image in test.images)])
    assert seen == sorted(image.numpy().tobytes() for image in every.images) and len(set(seen)) == 24


def test_a_data_set_with_test_images_is_tested_on_these(photos):
    config = loaders.resolve(config_for(photos, data={"held_out": 6}, loader="resident"), CPU)
    assert loaders.test_split(config) == "test" and len(loaders.test_set(config, None).labels) == 12
    assert len(loaders.Phases(config, CPU).enter(0)) == 31


def test_prepared_files_of_a_part_are_refused(no_test, tmp_path, capsys):
    write("dali", no_test / "source", tmp_path, "--limit", "20", "--splits", "train")
    phases = [{"epochs": 1, "batch_size": 6, "resolution": 32, "resize": "original"}]
    data = {"held_out": 6, "prepared": str(tmp_path)}
    config = loaders.resolve(config_for(no_test / "source", data=data, loader="torch", phases=phases), CPU)
    assert f"the prepared training images in {tmp_path} were written with --limit 20" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"needs all training images, and those in .* were written with --limit 20"):
        loaders.Phases(config, CPU).enter(0)
    with pytest.raises(DataError, match="held out of its prepared files: leave out --data"):
        loaders.from_source(config, str(no_test / "source"))


def test_small_data_sets_can_hold_out_too(tmp_path):
    write_files(tmp_path, image_set(count=10, folders=("train",)))
    found = sets.load("image_folder", "held_out", tmp_path, resolution=8, choice=Choice(held_out=4))
    rest = sets.load("image_folder", "train", tmp_path, resolution=8, choice=Choice(held_out=4))
    assert len(found.labels) == 4 and len(rest.labels) == 16 and not set(found.names) & set(rest.names)
