"""Tests of parts by name: the tables, parts of the user's own by their import path, and what is said where one is absent."""

import re
import sys

import numpy as np
import pytest
import torch
from config_files import MINIMAL, refusal
from PIL import Image

from fastrobust.attack import base
from fastrobust.config import datasets, parts, reading
from fastrobust.config.reading import load
from fastrobust.data import loaders, sets
from fastrobust.runtime.errors import ConfigError, DataError
from fastrobust.train.methods.base import Method
from fastrobust.train.optimizers import Optimizer
from fastrobust.train.schedules import Schedule

CPU = torch.device("cpu")
TABLES = {
    "method": (parts.METHODS, Method),
    "optimizer": (parts.OPTIMIZERS, Optimizer),
    "schedule": (parts.SCHEDULES, Schedule),
    "attack": (parts.ATTACKS, base.Attack),
}
OWN = """
import numpy as np, torch
from fastrobust.attack.base import Attack
from fastrobust.config.datasets import Dataset
from fastrobust.config.fields import Positive
from fastrobust.data.loaders.torch_workers import Torch
from fastrobust.train.methods.base import Method
from fastrobust.train.optimizers import Optimizer
from fastrobust.train.schedules import Schedule

class Gentle(Method):
    strength: Positive = 0.5
    reach: float | None = None
    def resolve(self, epsilon):
        self.reach = self.strength * epsilon
    def step(self, learner, batch, threat, scale, state):
        learner.update(batch.x, batch.y)

class Plain(Optimizer):
    def make(self, groups, lr):
        return torch.optim.SGD(groups, lr=lr, fused=True)

class Flat(Schedule):
    lr: Positive
    def rate(self, epoch, epochs):
        return self.lr
    def highest(self):
        return self.lr
    def check(self, epochs):
        if epochs > 20:
            raise ValueError("schedule: too long")

class Backwards(Torch):
    def decoded(self, jobs):
        for batch in super().decoded(jobs):
            yield batch._replace(images=batch.images.flip(3))

class Nothing(Attack):
    def run(self, x, y, start):
        return torch.ones(len(x), dtype=torch.bool), x

def read(split, path):
    count = {"train": 12, "test": 7}[split]
    if path == "broken":
        raise OSError("the disk is gone")
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 5, 5, 1), np.uint8)
    return (images[..., 0] if path == "flat" else images), np.arange(count) % (2 if path != "labels" else 9)

Grey = Dataset(1, 5, ("even", "odd"), (0.5,), (0.25,), read)
Four = Dataset(4, 5, ("a",), (0.0,) * 4, (1.0,) * 4, read)
Sizeless = Dataset(3, None, ("a",), (0.0,) * 3, (1.0,) * 3, read)
A_WORD = "word"

def a_function(*arguments):
    return None
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module `own_parts.inner` in the current folder."""
    (tmp_path / "own_parts").mkdir()
    (tmp_path / "own_parts" / "inner.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield "own_parts.inner"
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_parts"]:
        del sys.modules[name]


@pytest.mark.parametrize("kind", TABLES)
def test_every_name_of_a_table_is_a_class_of_its_kind(kind):
    table, base_class = TABLES[kind]
    for name in table:
        assert issubclass(parts.find(kind, table, name), base_class), name
    module, _, name = parts.BASES[kind].partition(":")
    assert (module, name) == (base_class.__module__, base_class.__name__)


def test_own_sections(file, own):
    found = load(
        file, [f"method={{name: '{own}:Gentle', strength: 1/4}}", f"optimizer={{name: '{own}:Plain', weight_decay: 1e-3}}",
               f"schedule={{name: '{own}:Flat', lr: 0.1}}", f"loader={own}:Backwards"]
    )  # fmt: skip
    assert type(found.method).__name__ == "Gentle" and found.method.name == f"{own}:Gentle"
    assert found.method.strength == 0.25 and found.method.reach == 0.25 * 8 / 255  # resolve was called
    assert found.optimizer.weight_decay == 1e-3 and found.schedule.rate(3, 15) == 0.1
    assert found.loader == f"{own}:Backwards"
    assert found.in_words() == f"{own}:Gentle, strength 0.25, reach {0.25 * 8 / 255}, epsilon 8/255"
    again = reading.parse(found.to_dict(), "again")
    assert again == found and type(again.method) is type(found.method)
    assert found.to_dict()["method"] == {"name": f"{own}:Gentle", "strength": 0.25, "reach": 0.25 * 8 / 255}


def test_a_section_that_lacks_a_part_of_its_protocol_is_refused(file, own, tmp_path):
    kinds = {"method": "train.methods.base:Method", "schedule": "train.schedules:Schedule"}
    kinds["optimizer"] = "train.optimizers:Optimizer"
    lines = [f"from fastrobust.{path.replace(':', ' import ')}\nclass Half{base}({base}): pass\n"
             for path in kinds.values() for base in [path.partition(":")[2]]]  # fmt: skip
    (tmp_path / "halves.py").write_text("".join(lines))
    for key, path in kinds.items():
        said = refusal(file, f"{key}={{name: 'halves:Half{path.partition(':')[2]}'}}")
        assert re.search(rf"{key}: 'halves:Half\w+' lacks (step|make|rate|highest)", said), said


def test_own_sections_are_checked(file, own):
    method, schedule = (f"{key}={{name: '{own}:{name}', %s}}" for key, name in (("method", "Gentle"), ("schedule", "Flat")))
    assert "method.strength: input should be greater than 0, got -1" in refusal(file, method % "strength: -1")
    assert "unknown key 'method.strenth'" in refusal(file, method % "strenth: 1")
    assert "schedule.lr: this key is needed" in refusal(file, schedule[:-5] + "}")
    assert "schedule: too long" in refusal(file, schedule % "lr: 1", "phases.0.epochs=21")


@pytest.mark.parametrize("key", ["method", "optimizer", "schedule"])
def test_a_section_that_is_absent_or_of_another_kind(file, own, key):
    def said(name):
        return refusal(file, f"{key}={{name: '{name}'}}").partition(":\n")[2].strip()

    among = "in the current folder or among the installed packages"
    assert said(f"{own}:Absent") == f"{key}: '{own}:Absent': the module has no 'Absent'"
    assert said("own_parts.outer:Gentle") == (
        f"{key}: 'own_parts.outer:Gentle': there is no module 'own_parts.outer' {among}"
    )
    assert said("own_part.inner:Gentle") == f"{key}: 'own_part.inner:Gentle': there is no module 'own_part' {among}"
    must = f"must be a class that derives from {parts.BASES[key]}: see docs/extending.md"
    for name in (f"{own}:A_WORD", f"{own}:a_function", f"{own}:Nothing", "fastrobust.config.schema:Guard"):
        assert said(name) == f"{key}: '{name}' {must}"
    for name in (":Gentle", f"{own}:", ":", "..inner:Gentle"):
        assert said(name) == f"{key}: '{name}' is not of the form package.module:name"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import no_such_package", "needs the package 'no_such_package', which is not installed"),
        ("from json import no_such_name", "cannot be imported: ImportError: cannot import name 'no_such_name'"),
        ("import json\njson.no_such_name", "cannot be imported: AttributeError: module 'json' has no attribute"),
        ("a b", "cannot be imported: SyntaxError: invalid syntax"),
        ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
        ("open('no such file')", "cannot be imported: FileNotFoundError: "),
    ],
)
def test_a_module_that_fails_as_it_is_imported(file, own, tmp_path, code, said):
    (tmp_path / "own_parts" / "bad.py").write_text(code)
    assert f"method: 'own_parts.bad:Gentle' {said}" in refusal(file, "method={name: 'own_parts.bad:Gentle'}")


# ---- data sets


def test_an_own_data_set(file, own, tmp_path):
    found = load(file, [f"data.dataset={own}:Grey", "model.name=mnist_net"])
    assert found.model.mean == (0.5,) and found.model.std == (0.25,) and found.facts.classes == ("even", "odd")
    assert found.phases[0].resolution == found.phases[0].resize == 5
    for split, count in (("train", 12), ("test", 7)):
        data = sets.load(f"{own}:Grey", split)
        assert data.images.shape == (count, 1, 5, 5) and data.images.dtype == torch.uint8
        assert data.images.is_contiguous(memory_format=torch.channels_last)
        assert data.images[:, 0, 2, 2].tolist() == list(range(count))
        assert data.labels.tolist() == [k % 2 for k in range(count)] and data.classes == ("even", "odd")
    assert sets.load(f"{own}:Grey", "train", limit=3).images[:, 0, 0, 0].tolist() == [0, 4, 8]
    resolved = loaders.resolve(load(file, [f"data.dataset={own}:Grey", "phases.0.batch_size=4"]), CPU)
    assert resolved.loader == "resident"
    batch = next(loaders.Phases(resolved, CPU).enter(0).batches(0, 0, 4, 0, 1))
    assert batch.images[:, 0, 0, 0].tolist() == batch.index.tolist()


def test_an_own_data_set_that_is_none(file, own):
    for name, said in (
        ("Absent", "the module has no 'Absent'"),
        ("A_WORD", "must be a fastrobust.config.datasets.Dataset with size, classes and read"),
        ("Sizeless", "must be a fastrobust.config.datasets.Dataset with size, classes and read"),
        ("Four", "has 4 channels: it must have 1 or 3"),
    ):
        text = refusal(file, f"data.dataset={own}:{name}")
        assert re.search(rf"data\.dataset: '{own}:{name}':? {said}", text), text
        with pytest.raises(DataError, match=said):
            sets.load(f"{own}:{name}", "train")
    assert datasets.facts("cifar10").classes[3] == "cat"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("broken", "could not read its train images: OSError: the disk is gone"),
        ("flat", r"must give train images as uint8 N x 5 x 5 x 1, not uint8 \(12, 5, 5\)"),
        ("labels", "label 2 of image 2 is outside 0..1"),
    ],
)
def test_an_own_data_set_that_gives_something_else(own, path, said):
    with pytest.raises(DataError, match=said):
        sets.load(f"{own}:Grey", "train", path)


# ---- loaders, attacks, models


def test_an_own_loader(file, own, tmp_path):
    for split in ("train", "test"):
        for k in range(4):
            (tmp_path / "images" / split / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(k).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / split / "ab"[k % 2] / f"{k}.png")
    changes = [f"loader={own}:Backwards", "data.dataset=image_folder", "data.path=images", "phases.0.resolution=8"]
    config = loaders.resolve(load(file, [*changes, "phases.0.batch_size=4", "data.workers=1"]), CPU)
    assert config.loader == f"{own}:Backwards"
    theirs = loaders.Phases(config.model_copy(update={"loader": "torch"}), CPU).enter(0)
    for mine, plain in zip(loaders.Phases(config, CPU).enter(0).batches(0, 0, 4, 0, 3), theirs.batches(0, 0, 4, 0, 3),
                           strict=True):  # fmt: skip
        assert torch.equal(mine.images, plain.images.flip(3)) and torch.equal(mine.index, plain.index)
        assert not torch.equal(mine.images, plain.images)


def test_a_loader_that_is_absent_or_none(file, own):
    assert "loader: 'residnet' is not one of auto, resident, ffcv, dali, torch; did you mean 'resident'?" in refusal(
        file, "loader=residnet"
    )
    for name, said in (("Absent", "the module has no 'Absent'"), ("Gentle", "must be a class that derives from")):
        config = loaders.resolve(load(file, [f"loader={own}:{name}"]), CPU)
        with pytest.raises(ConfigError, match=f"loader: '{own}:{name}'.* {said}"):
            loaders.Phases(config, CPU)


def test_an_own_attack(own):
    kind, numbers = base.parse(f"{own}:Nothing")
    assert issubclass(kind, base.Attack) and kind.__name__ == "Nothing" and numbers == ()
    assert re.fullmatch(rf"{own} [0-9a-f]{{12}}", kind.made_by()), "verdicts of other code are told apart"
    with pytest.raises(ConfigError, match="the attack takes no numbers, found 3-4"):
        base.parse(f"{own}:Nothing-3-4")
    with pytest.raises(
        ConfigError, match=f"attack: '{own}:Gentle' must be a class that derives from {parts.BASES['attack']}"
    ):
        base.parse(f"{own}:Gentle")
    with pytest.raises(ConfigError, match=r"attack: 'pdg' is not one of pgd, .*; did you mean 'pgd'\?"):
        base.parse("pdg-50-10")
    kind, numbers = base.parse("pgd-50-10")
    assert kind.__name__ == "Pgd" and numbers == (50, 10)
