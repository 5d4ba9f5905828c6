"""A made-up data set, configs of small runs on it, and one finished run that tests may read but not change."""

from __future__ import annotations

import copy
import gc
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import loader_batches
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from training_runs import CPU, SMALL

from fastrobust.__main__ import main as cli
from fastrobust.config import reading
from fastrobust.runtime import run_directory
from fastrobust.runtime.distributed import ALONE
from fastrobust.train import start
from fastrobust.train.training import Training
from tests.stress import child

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: without a GPU kernels run in its interpreter
torch.set_num_threads(1)  # the models here are too small to gain from more


def skip_lines(reports) -> list[str]:
    """One line for each reason for which tests were skipped, with their number; reports as pytest keeps them."""
    reasons = (str(r.longrepr[2] if isinstance(r.longrepr, tuple) else r.longrepr) for r in reports)
    counts = Counter(reason.removeprefix("Skipped: ") for reason in reasons)
    return [f"{count:>5} skipped: {reason}" for reason, count in counts.most_common()]


def pytest_terminal_summary(terminalreporter):
    for line in skip_lines(terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(line)


def pytest_collection_finish():
    """What is imported stays: the garbage collector, which some tests call often, need not look at a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def verifying_processes_start_at_once():
    """They are forked from one that has imported torch already, as processes of `tests.stress` are. Commands that run in a
    process of their own start theirs as users' do."""
    try:
        from fastrobust.verification import workers
    except ImportError:  # nothing is verified without HiGHS
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "get_context", lambda method: child.CONTEXT)
        patch.setattr(workers, "DieWith", lambda parent: child.stay)
        yield


@pytest.fixture(scope="session", autouse=True)
def signals_as_usual():
    """A shell that starts pytest in the background has it ignore Ctrl-C, nohup has it ignore SIGHUP, and its children too;
    some tests send one."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def bar_images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 count x 28 x 28 x 3, labels): class c has a bright bar, horizontal for c < 5 and vertical for the others, at
    a place that depends on c. Classes are of one size."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    images = rng.normal(0.2, 0.1, (count, 28, 28, 3))
    for image, label in zip(images, labels, strict=True):
        place = 2 + 5 * (label % 5) + rng.integers(-1, 2)
        bar = image[place : place + 3] if label < 5 else image[:, place : place + 3]
        bar += rng.uniform(0.1, 0.7)  # some are faint
    return (images.clip(0, 1) * 255).round().astype(np.uint8), labels


def write_folder(root: Path, train: int, test: int) -> Path:
    """An image folder of bars, as PNG files: root/{train,test}/<class>/<number>.png."""
    for seed, (split, count) in enumerate({"train": train, "test": test}.items()):
        for i, (image, label) in enumerate(zip(*bar_images(count, seed), strict=True)):
            file = root / split / f"bar{label}" / f"{i:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
    return root


@pytest.fixture(scope="session")
def bars(tmp_path_factory) -> Path:
    """600 train and 200 test images of 10 classes, 28 x 28."""
    return write_folder(tmp_path_factory.mktemp("bars"), 600, 200)


@pytest.fixture(scope="session")
def few_bars(tmp_path_factory) -> Path:
    """70 train and 20 test images."""
    return write_folder(tmp_path_factory.mktemp("few_bars"), 70, 20)


def photo(seed: int, width: int, height: int) -> Image.Image:
    """A smooth RGB picture, so that JPEG and resizing change it little: a few waves of random direction and colour."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 40.0
    waves = [np.sin(a * x + b * y + c) for a, b, c in rng.uniform(-3, 3, (6, 3))]
    mix = np.tensordot(rng.uniform(-1, 1, (3, 6)), np.array(waves), 1).transpose(1, 2, 0)
    return Image.fromarray((127.5 + 50 * mix).clip(0, 255).astype(np.uint8))


def write_photos(root: Path, train: int, test: int) -> Path:
    """An image folder of JPEG photos of many sizes in three classes, some of them grey, CMYK or turned by EXIF data."""
    for split, count in {"train": train, "val": test}.items():
        for i in range(count):
            rng = np.random.default_rng([i, len(split)])
            image = photo(100 * len(split) + i, *(int(side) for side in rng.integers(40, 121, 2)))
            options: dict = {"quality": 95, "subsampling": 0}
            if i % 8 == 3:
                image = image.convert("L")
            elif i % 8 == 5:
                image = image.convert("CMYK")
            elif i % 8 == 6:
                options["exif"] = Image.Exif()
                options["exif"][0x0112] = 6  # turn by 90 degrees
            file = root / split / "abc"[i % 3] / f"{i:03}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file, "JPEG", **options)
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """37 train and 12 test photos, 40 to 120 pixels wide and high."""
    return write_photos(tmp_path_factory.mktemp("photos"), 37, 12)


@pytest.fixture(scope="session")
def written(photos, tmp_path_factory) -> Path:
    """The photos in prepared files: see `loader_batches.write_prepared`."""
    return loader_batches.write_prepared(photos, tmp_path_factory.mktemp("written"))


@pytest.fixture
def made(written, photos):
    """made(name, size, resolution, …) -> a loader of the photos, closed afterwards: see `loader_batches.open_loader`."""
    opened = []

    def make(name, *arguments, **options):
        opened.append(loader_batches.open_loader(name, written, photos, *arguments, **options))
        return opened[-1]

    yield make
    for loader in opened:
        loader.close()


@pytest.fixture(scope="session")
def settings(bars):
    """settings(output, key=value, data__limit=9, ...) -> the config of a small run, as a dict: `__` stands for a dot, and
    None takes a key away."""
    base = {
        "name": "bars",
        "device": "cpu",
        "precision": "fp32",
        "epsilon": 0.05,
        "data": {"dataset": "image_folder", "path": str(bars)},
        "model": {"name": "mnist_net"},
        "method": {"name": "fgsm"},
        "optimizer": {"name": "adam"},
        "schedule": {"name": "cyclic", "max_lr": 5e-3},
        "phases": [{"epochs": 3, "batch_size": 20, "resolution": 28}],
        "evaluation": {"steps": 7, "restarts": 2, "epsilon": [0.1, 0.05]},
    }

    def make(output: Path, **changes) -> dict:
        result = copy.deepcopy(base) | {"output": str(output)}
        for key, value in changes.items():
            *parents, last = key.split("__")
            node = result
            for part in parents:
                node = node.setdefault(part, {})
            if value is None:
                del node[last]
            else:
                node[last] = copy.deepcopy(value)
        return result

    return make


@pytest.fixture(scope="session")
def config_file(settings):
    """config_file(folder, **changes) -> a YAML file in the folder, of a run that goes to folder/runs."""

    def make(folder: Path, **changes) -> Path:
        file = folder / "bars.yaml"
        file.write_text(yaml.safe_dump(settings(folder / "runs", **changes)))
        return file

    return make


@pytest.fixture
def quick(config_file, few_bars, tmp_path):
    """quick(**changes) -> the config file of a run of four updates in tmp_path/runs/bars."""
    small = {"phases": [{"epochs": 2, "batch_size": 35, "resolution": 28}], "evaluation": {"steps": 1, "restarts": 1}}
    return lambda **changes: config_file(tmp_path, **({"data__path": str(few_bars)} | small | changes))


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory, config_file) -> Path:
    """The directory of a finished FGSM run of 3 epochs, made by the train command. Tests use `finished_run`, a copy."""
    folder = tmp_path_factory.mktemp("finished")
    assert cli(["train", str(config_file(folder))]) == 0
    return folder / "runs" / "bars"


@pytest.fixture(scope="module")
def finished_run(trained_once, tmp_path_factory) -> Path:
    """A finished run for one file of tests, so that no file finds what another file's evaluations left in it."""
    return shutil.copytree(trained_once, tmp_path_factory.mktemp("finished") / "runs" / "bars")


@pytest.fixture
def config_of(settings, few_bars, tmp_path):
    """config_of(**changes) -> the resolved Config of a small run (see `settings`); phases__0__epochs is one more key."""

    def make(**changes):
        epochs = changes.pop("phases__0__epochs", None)
        made = settings(tmp_path, **({"data__path": str(few_bars)} | SMALL | changes))
        if epochs is not None:
            made["phases"][0]["epochs"] = epochs
        return start.resolve(reading.parse(made, "test"), CPU, ALONE)

    return make


@pytest.fixture
def begin(tmp_path):
    """begin(config, name) -> a Training whose files go to a folder of that name."""

    def make(config, name="run"):
        (tmp_path / name).mkdir(exist_ok=True)
        return Training(config, tmp_path / name, CPU)

    return make


@pytest.fixture
def resume(begin):
    def make(config, name="run"):
        torch.manual_seed(987)  # whatever the state of the generator is
        job = begin(config, name)
        job.restore(*run_directory.load_checkpoint(job.directory))
        return job

    return make
