"""The examples do what fastrobust does. `fgsm_cifar10.py` imports nothing of it and trains the same weights."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import cifar_batches, image_set, tar_bytes, write_files

from benchmarks.usual_loop import plain_pgd
from fastrobust.attack.pgd import attack
from fastrobust.attack.threat import Threat
from fastrobust.config import reading
from fastrobust.config.datasets import DATASETS
from fastrobust.data import sets
from fastrobust.data.loaders.resident import Resident
from fastrobust.data.sets import ImageSet
from fastrobust.train.schedules import lr_table
from fastrobust.train.step import build

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("fgsm_cifar10", ROOT / "examples/fgsm_cifar10.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_images(count: int) -> ImageSet:
    """Black and white pixels are among them: the box cuts their perturbations."""
    rng = np.random.default_rng(0)
    pixels = (rng.integers(-40, 296, (count, 32, 32, 3)).clip(0, 255)).astype(np.uint8)
    labels = torch.arange(count) % 10
    return ImageSet(torch.from_numpy(pixels).permute(0, 3, 1, 2), labels, DATASETS["cifar10"].classes, "random")


def as_in(model, other) -> dict[str, torch.Tensor]:
    """The tensors of one model under the names of the other, in the order in which both have them."""
    return dict(zip(other.state_dict(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("augmented", [False, True], ids=["as they are", "cropped and mirrored"])
def test_the_example_trains_the_weights_of_a_step(example, augmented):
    """Bit for bit, in fp32 on a CPU: same first weights, batches and random numbers; BatchNorm's averages included."""
    changes = ["precision=fp32", "device=cpu", "phases.0.epochs=2", "phases.0.batch_size=4"]
    changes += [] if augmented else ["data.augment={crop: none}"]
    config = reading.load(ROOT / "configs/cifar10_fgsm_fast.yaml", changes)
    loader = Resident(random_images(9), CPU)
    step = build(config, loader, CPU)
    model = example.PreActResNet18().to(memory_format=torch.channels_last)
    model.load_state_dict(as_in(step.learner.model, model))
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)
    first = {name: t.clone() for name, t in model.state_dict().items()}
    batches = list(loader.batches(0, 0, 4, 0, 5))
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        step(batch)
        torch.manual_seed(number)
        x = example.augment(batch.images) if augmented else batch.images.float() / 255
        example.update(model, optimizer, x, batch.labels, example.cyclic((number + 0.5) / len(batches)))
    theirs = as_in(step.learner.model, model)
    different = [name for name, t in model.state_dict().items() if not torch.equal(t, theirs[name])]
    assert different == []
    assert any((t.float() - first[name].float()).abs().max() > 0.01 for name, t in model.state_dict().items())


def test_the_settings_are_those_of_the_paper(example):
    config = reading.load(ROOT / "configs/cifar10_fgsm_fast.yaml")
    assert (config.epsilon, config.method.alpha, 128) == (example.EPSILON, example.ALPHA, example.BATCH)
    assert (config.evaluation.steps, config.evaluation.restarts) == (example.STEPS, example.RESTARTS)
    updates = 5860  # 15 epochs of 50,000 images
    table = lr_table(config, 50_000)
    rates = torch.tensor([example.cyclic((u + 0.5) / updates) for u in range(updates)])
    assert len(table) == updates and torch.allclose(rates, table, rtol=1e-6, atol=0)


def test_every_epoch_has_every_image_once(example, monkeypatch):
    """10 images, 3 epochs, batches of 4: the images left over open the next epoch; the last batch alone is smaller."""
    seen, rates = [], []

    def note(model, optimizer, x, y, rate):
        seen.append(y.tolist())
        rates.append(rate)
        return torch.zeros(())

    monkeypatch.setattr(example, "BATCH", 4)
    monkeypatch.setattr(example, "update", note)
    data = random_images(10)
    example.train(torch.nn.Linear(1, 1), data.images, data.labels, 3)
    assert [len(batch) for batch in seen] == [4, 4, 4, 4, 4, 4, 4, 2]
    stream = [label for batch in seen for label in batch]
    epochs = [stream[k : k + 10] for k in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert rates == [example.cyclic((k + 0.5) / 8) for k in range(8)] and min(rates) > 0


def test_its_pgd_gives_the_verdicts_of_ours(example, monkeypatch):
    """Image by image, from the same starts; and the accuracies are those of a plain loop over all images."""
    settings = {"epsilon": 0.002, "alpha": 0.0005, "steps": 4, "restarts": 2, "batch_size": 40}
    for name in ("epsilon", "steps", "restarts"):
        monkeypatch.setattr(example, name.upper(), settings[name])
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)).eval()
    data = random_images(40)
    x = data.images.float() / 255
    labels = model(x).topk(2).indices[torch.arange(40), (torch.arange(40) % 4 == 0).long()]  # three quarters are right
    starts = [example.random_start(x) for _ in range(2)]
    survived = example.survives(model, x, labels, starts[0])
    ours = attack(model, x, labels, starts[0], threat=Threat(0.002), alpha=0.0005, steps=4)
    assert torch.equal(survived, ours) and 0 < int(survived.sum()) < 30

    noise = lambda restart, first, count: starts[restart][first : first + count]
    robust = plain_pgd(model, data.images, labels, noise, **settings)
    left = iter(starts)  # of each restart; those of the images that are attacked

    def start(points):
        rows = (points[:, None].flatten(2) == x[None].flatten(2)).all(2).float().argmax(1)
        return next(left)[rows]

    monkeypatch.setattr(example, "random_start", start)
    assert example.evaluate(model, data.images, labels) == (0.75, int(robust.sum()) / 40)


@pytest.mark.parametrize("form", ["folder", "tar", "images", "image tar"])
def test_it_reads_what_fastrobust_reads(example, tmp_path, form):
    place = tmp_path / "set"
    if "image" in form:
        files = image_set(DATASETS["cifar10"].classes, count=2, folders=("train", "test"))
    else:
        files = {f"cifar-10-batches-py/{name}": content for name, content in cifar_batches()[0].items()}
        files["cifar-10-batches-py/batches.meta"] = b"not read"
    if "tar" in form:
        place = tmp_path / "set.tar"
        place.write_bytes(tar_bytes(files))
    else:
        write_files(place, files)
        place = place / "cifar-10-batches-py" if form == "folder" else place
    found = example.read(place)
    for split in ("train", "test"):
        expected = sets.load("cifar10", split, place)
        assert torch.equal(found[split][0], expected.images) and torch.equal(found[split][1], expected.labels)


def test_the_whole_example(example, tmp_path, monkeypatch, capsys):
    write_files(tmp_path, image_set(DATASETS["cifar10"].classes, count=2, folders=("train", "test")))
    monkeypatch.setattr(example, "STEPS", 2)
    monkeypatch.setattr(example, "RESTARTS", 2)
    monkeypatch.setattr(example, "BATCH", 4)
    monkeypatch.setattr("sys.argv", ["fgsm_cifar10.py", str(tmp_path), "--epochs", "1", "--limit", "8"])
    example.main()
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step 0 of 2  rate 0.131") and "robust under PGD-2-2" in last


def test_the_example_stands_alone():
    """It imports nothing of fastrobust."""
    text = (ROOT / "examples/fgsm_cifar10.py").read_text()
    assert "import fastrobust" not in text and "from fastrobust" not in text


def test_from_python_runs_and_is_loaded_again(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples/from_python.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    run, evaluation, same = done.stdout.splitlines()[-3:]
    assert run.startswith("Run(runs/squares: ") and same == "the loaded model is the same: True"
    assert float(evaluation.partition("robust_accuracy=")[2].partition(",")[0]) > 0.9  # three seeds gave 1.0


def test_the_run_of_ones_own_parts_is_evaluated_exported_and_reported(tmp_path):
    """The commands of docs/extending.md, in a copy of the folder: own network, data set and all other parts."""
    shutil.copytree(ROOT / "examples", tmp_path, dirs_exist_ok=True)
    text = (ROOT / "docs/extending.md").read_text()
    (block,) = re.findall(r"```\ncd examples\n(.*?)```", text, re.DOTALL)
    commands = [line.partition("#")[0].split()[1:] for line in block.splitlines()]
    assert [words[0] for words in commands[1:]] == ["train", "evaluate", "export", "report"]
    module, *others = commands  # the others in one process: each would import all anew
    code = "import sys\nfrom fastrobust.__main__ import main\n"
    code += "".join(f"if main({words}): sys.exit({words})\n" for words in others)
    for arguments in module, ["-c", code]:
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert "runs/own_parts is finished" in done.stdout
    model = subprocess.run(
        [sys.executable, "-c", "import model; print(model.CLASSES, model.load().training)"],
        cwd=tmp_path / "runs/own_parts/export",
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert model.stdout == "['top left', 'top right', 'bottom left', 'bottom right'] False\n", model.stderr
    assert "own_parts" in (tmp_path / "report.html").read_text()
