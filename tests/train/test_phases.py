"""Three phases of growing images through every loader, stopped within epochs and gone on with: the same bits in the end."""

import json
from pathlib import Path

import pytest
import torch
from data_files import need, prepare
from training_runs import CPU, assert_same_end, before_step, crash, stop_at

from fastrobust.config import reading
from fastrobust.data import loaders, sets
from fastrobust.runtime import run_directory
from fastrobust.runtime.interrupt import Interrupted
from fastrobust.train.training import Training

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def prepared(photos, tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    for kind, name in (("ffcv", "ffcv"), ("webdataset", "dali")):
        arguments = ["--source", str(photos), "--output", str(root / name), "--sizes", "24", "40", "original"]
        assert prepare(kind, ["image_folder", *arguments]) == 0
    return root


@pytest.mark.parametrize("name", ["resident", "ffcv", "dali", "torch", "torch from shards"])
def test_three_phases_end_with_the_same_bits_however_often_interrupted(name, photos, prepared, tmp_path):
    need(name)
    last = 48 if name == "resident" else "original"
    phases = [
        {"epochs": 2, "batch_size": 12, "resize": 24, "resolution": 16},  # batches: 4, then 7
        {"epochs": 1, "batch_size": 10, "resize": 40, "resolution": 24},  # 4
        {"epochs": 1, "batch_size": 8, "resize": last, "resolution": 32},  # 5
    ]
    place = {"ffcv": "ffcv", "dali": "dali", "torch from shards": "dali"}.get(name)
    config = {
        "name": "a", "loader": name.partition(" ")[0], "epsilon": "4/255", "device": "cpu", "precision": "fp32",
        "output": str(tmp_path),
        "data": {"dataset": "image_folder", "path": str(photos), "workers": 2, "prepared": place and str(prepared / place),
                 "augment": {"crop": "random_resized", "flip": True}},
        "model": {"name": "preact_resnet18_w16"}, "method": {"name": "fgsm", "init": "previous"},
        "optimizer": {"name": "sgd", "decay_batchnorm": False}, "guard": {"action": "warn", "steps": 1},
        "schedule": {"name": "points", "points": [[0, 0], [1, 0.05], [4, 0.001]]}, "phases": phases,
        "evaluation": {"steps": 2, "restarts": 2},
    }  # fmt: skip
    config = loaders.resolve(reading.parse(config, "test"), CPU)

    def begin(folder: str, resume: bool) -> Training:
        (tmp_path / folder).mkdir(exist_ok=True)
        torch.manual_seed(987)  # whatever the state of the generator is
        job = Training(config, tmp_path / folder, CPU)
        if resume:
            job.restore(*run_directory.load_checkpoint(job.directory))
        return job

    reference, shapes = begin("reference", False), []
    take = reference.step.take
    reference.step.take = lambda batch: (shapes.append(tuple(batch.images.shape)), take(batch))
    reference.train()
    assert len(reference.history) == 4 and reference.learner.updates.item() == 16
    sides = [16] * 7 + [24] * 4 + [32] * 5 if name != "resident" else [24] * 7 + [40] * 4 + [48] * 5
    assert [shape[2:] for shape in shapes] == [(side, side) for side in sides]

    job, stops = begin("stopped", False), 0
    for act in (lambda job: stop_at(job, 6), lambda job: before_step(job, 3, crash), lambda job: stop_at(job, 7)):
        act(job)  # a signal in the second epoch, a crash in the second phase, a signal in the third
        with pytest.raises((Interrupted, ZeroDivisionError)):
            job.train()
        stops += 1
        job.loader.close()
        job = begin("stopped", True)
    job.train()
    assert stops == 3
    assert_same_end(job, reference)
    test = loaders.test_set(config, 10)
    assert test.images.shape == (10, 3, 32, 32) and test.classes == ("a", "b", "c")
    whole = sets.load("image_folder", "test", photos, resolution=32, limit=10)
    assert test.labels.tolist() == whole.labels.tolist()
    assert (test.images.int() - whole.images.int()).abs().float().mean() < 5
    for done in (job, reference):
        done.loader.close()


@pytest.mark.parametrize("file", ["imagenet_3phase", "imagenet_3phase_eps2", "imagenette_3phase"])
def test_configs_of_three_phases(file):
    config = reading.load(ROOT / "configs" / f"{file}.yaml")
    assert config.method.alpha == pytest.approx(1.25 * config.epsilon)
    assert [phase.epochs for phase in config.phases] == [6, 6, 3] and config.phases[2].resize == "original"
    assert not config.optimizer.decay_batchnorm and config.optimizer.weight_decay == 1e-4
    if file.startswith("imagenet_"):
        rows = [(phase.resize, phase.resolution, phase.batch_size) for phase in config.phases]
        assert rows == [(160, 128, 512), (352, 224, 224), ("original", 288, 128)]
        assert config.schedule.points == ((0, 0), (1, 0.4), (6, 0.04), (12, 0.004), (15, 0.0004))
        assert config.epsilon == (4 if file == "imagenet_3phase" else 2) / 255 and config.model.name == "resnet50"


def test_the_free_config():
    config = reading.load(ROOT / "configs" / "imagenet_free.yaml")
    assert config.replays == 4 and config.passes(config.phases[0]) == 23
    assert json.loads(json.dumps(config.to_dict()))["loader"] == "auto"
