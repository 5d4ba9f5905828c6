"""Several processes against one: the same weights, the same verdicts; mistakes are said once."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from process_runs import CPU, ZERO, ended_well, main, resolved, small_run, weights
from training_runs import before_step, without_times

from fastrobust.__main__ import main as cli
from fastrobust.attack.verdicts import Verdicts
from fastrobust.data.augment import to_unit
from fastrobust.evaluation import results
from fastrobust.runtime import distributed, run_directory
from fastrobust.runtime.interrupt import Interrupted
from fastrobust.train import checkpoint, guard, learner, training
from fastrobust.train.training import Training
from tests.stress.ranks import together


@pytest.fixture
def quick(config_file, few_bars, tmp_path):
    return lambda **changes: small_run(config_file, few_bars, tmp_path, **changes)


# ---- the same training


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ({"name": "standard"}, {}),
        (ZERO, {}),
        ({"name": "fgsm", "init": "previous"}, {}),
        (ZERO | {"ibp_weight": 0.3}, {}),
        (ZERO, {"phases": [{"epochs": 3, "batch_size": 20, "resolution": 28, "accumulate": 2}]}),
        ({"name": "pgd", "init": "zero", "steps": 2, "alpha": 0.03}, {}),
        ({"name": "free", "replays": 2}, {"phases": [{"epochs": 4, "batch_size": 20, "resolution": 28}]}),
        (ZERO, {"loader": "torch", "data__workers": 2, "data__augment": {"crop": "random_resized", "flip": True}}),
    ],
    ids=["standard", "fgsm zero", "fgsm previous", "fgsm ibp", "accumulate", "pgd", "free", "crops of a loader"],
)
def test_two_processes_train_what_one_does(method, more, quick, tmp_path):
    """In fp32, to 1e-4: the mean of two halves' gradients is summed in another order, and a pixel whose gradient is nearly 0
    may go the other way. Only what draws no random numbers in the step can agree."""
    file = quick(method=method, **more)
    assert ended_well(together(tmp_path, main, str(file), "name=two"))
    assert main(str(file), "name=one") == 0
    one, two = weights(tmp_path / "runs/one"), weights(tmp_path / "runs/two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-4)
    found = [json.loads((tmp_path / "runs" / n / run_directory.SUMMARY).read_text()) for n in ("one", "two")]
    assert found[1]["processes"] == 2 and found[0]["processes"] == 1
    losses = [
        [json.loads(x)["loss"] for x in (tmp_path / "runs" / n / run_directory.METRICS).open()] for n in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


NEWER = [
    {"name": "fgsm_uap"},
    {"name": "class_uap"},
    {"name": "liet", "every": 3},
    {"name": "fgsm_pgi", "reset": 2},
    {"name": "trades", "steps": 2},
    {"name": "n_aaer", "alpha": 0.4},
    {"name": "rs_cs", "threshold": 0.001},
    {"name": "gradalign"},
    {"name": "sora"},
    {"name": "awp", "begin": 0, "gamma": 0.05, "of": {"name": "fgsm", "init": "zero"}},
]


def newer_methods(file: str, output: str) -> int:
    """Each of them for ten steps in three epochs, with numbers in the place of random ones; what each process has in the
    end goes to files."""
    patch, ended = pytest.MonkeyPatch(), {}
    with patch.context() as p, distributed.joined("cpu") as (world, device):
        p.setattr(torch, "rand", lambda shape, **options: torch.full(shape, 0.7))
        for name in ("rand_like", "randn_like"):
            p.setattr(torch, name, lambda t: 0.5 + 0.5 * (37 * t.detach()).sin())
        for method in NEWER:
            job = Training(resolved(file, f"method={json.dumps(method)}"), Path("unused"), device, world=world)
            for batch in job.loader.batches(0, 0, 20, 0, 10):
                job.step(batch)
            tensors = {f"model.{key}": t for key, t in job.learner.model.state_dict().items()} | job.step.state
            ended |= {f"{method['name']} {key}": t.clone() for key, t in tensors.items()}
            stored = [key for key in checkpoint.pack(job)[0] if "state." in key]
            assert stored == [f"state.{key}" for key in job.step.state], "once, and not for each process"
        torch.save(ended, f"{output}.{world.rank}")
    return 0


def recovering(file: str, output: str) -> int:
    """A run that overfits in its second epoch and recovers, whole and with a signal after its ninth step; with numbers in
    the place of random ones. What both have in the end goes to files."""
    looks, patch = [], pytest.MonkeyPatch()

    def made_up(model, images, labels, **settings):
        looks.append(1)
        everyone = torch.ones(len(labels), dtype=torch.bool)
        return Verdicts(everyone, ~everyone if len(looks) == 2 else everyone)

    with patch.context() as p, distributed.joined("cpu") as (world, device):
        p.setattr(guard, "pgd", made_up)
        p.setattr(guard, "ENOUGH", 65)
        p.setattr(training, "AGREE_EVERY", 1)
        p.setattr(learner, "EVERY", 1)
        p.setattr(torch, "rand_like", lambda t: 0.5 + 0.5 * (37 * t.detach()).sin())
        config, ended = resolved(file), {}
        for name in ("whole", "stopped"):
            looks.clear()
            (directory := Path(f"{output}.{name}")).mkdir(exist_ok=True)
            job = Training(config, directory, device, world=world)
            if name == "stopped":
                before_step(job, 9, lambda job=job: job._note_signal(signal.SIGTERM, None))
                with pytest.raises(Interrupted):
                    job.train()
                job = Training(config, directory, device, world=world)
                job.restore(*run_directory.load_checkpoint(directory))
            job.train()
            tensors = {key: t.clone() for key, t in job.learner.tensors().items()}
            ended[name] = tensors, without_times(job.history), job.step.method.describe()
        torch.save(ended, f"{output}.{world.rank}")
    return 0


def test_two_processes_recover_as_one_does(quick, tmp_path):
    """From the same epoch, to the same method; interrupted after it, to the same bits in both."""
    file = str(quick(method=ZERO, guard={"action": "recover"}))
    assert ended_well(together(tmp_path, recovering, file, str(tmp_path / "two")))
    assert recovering(file, str(tmp_path / "one")) == 0
    one, *two = (torch.load(tmp_path / n, weights_only=True) for n in ("one.0", "two.0", "two.1"))
    for run in (one, *two):
        assert [r.get("went_back_to") for r in run["whole"][1]] == [None, 1, None]
        assert run["whole"][1:] == run["stopped"][1:] and run["whole"][2].startswith("n_fgsm")
        for name, t in run["whole"][0].items():
            assert torch.equal(t, run["stopped"][0][name]), name
            if name.startswith(("model.", "optimizer.")):
                torch.testing.assert_close(t, one["whole"][0][name], rtol=0, atol=1e-4)
    alignments = [[record["alignment"] for record in run["whole"][1]] for run in (one, *two)]
    assert alignments[1] == alignments[2] == pytest.approx(alignments[0], abs=1e-3)


def test_newer_methods_in_two_processes_are_those_in_one(quick, tmp_path):
    """Their states are the same in both processes, and those of one process that has whole batches. (Here nothing is
    random: a process draws for its own part of a batch.)"""
    file = str(quick(method={"name": "standard"}))
    assert ended_well(together(tmp_path, newer_methods, file, str(tmp_path / "two")))
    assert newer_methods(file, str(tmp_path / "one")) == 0
    one, first, second = (torch.load(tmp_path / name) for name in ("one.0", "two.0", "two.1"))
    assert all(torch.equal(first[key], second[key]) for key in first) and len(first) > 80
    for key, t in one.items():
        apart = (t.float() - first[key].float()).abs()
        signs = key.split()[1] in ("u", "information", "delta", "m")  # a pixel whose gradient is nearly 0 may go either way
        assert (apart > (0.02 if signs else 2e-4)).float().mean() <= (0.005 if signs else 0), key


def attack_alone(file: str) -> int:
    """Process 0 makes attack passes that process 1 does not."""
    config = resolved(file)
    with distributed.joined(config.device) as (world, device):
        job = Training(config, Path("unused"), device, world=world)
        batch = next(job.loader.batches(0, 0, 20, 0, 1))
        assert len(batch.labels) == 10
        if world.rank == 0:
            for _ in range(3):
                job.learner.input_gradient(to_unit(batch.images), batch.labels)
        job.step(batch)
        print(world.gather(sum(float(p.detach().double().sum()) for p in job.learner.model.parameters())))
    return 0


def test_attack_passes_exchange_nothing(quick, tmp_path):
    processes = together(tmp_path, attack_alone, str(quick(method=ZERO)), limit=60)
    assert ended_well(processes)
    sums = json.loads(processes[0].output.splitlines()[-1])
    assert sums[0] == sums[1], "the weights are the same after the update"


def test_running_averages_are_those_of_the_processes_together(quick, tmp_path):
    """One step of standard training; by hand: each half through a fresh model, then the mean."""
    phases = [{"epochs": 1, "batch_size": 40, "resolution": 28}]
    changes = {"model__name": "preact_resnet18_w16", "method": {"name": "standard"}, "data__limit": 40, "phases": phases}
    file = quick(**changes)
    assert ended_well(together(tmp_path, main, str(file), "name=two"))
    job = Training(resolved(file), tmp_path, CPU)
    images = next(job.loader.batches(0, 0, 40, 0, 1)).images
    before = {name: t.clone() for name, t in job.learner.model.state_dict().items()}
    halves = []
    for half in images.split(20):
        job.learner.model.load_state_dict(before)
        job.learner.model(to_unit(half))
        halves.append({name: t.clone() for name, t in job.learner.model.named_buffers()})
    found = weights(tmp_path / "runs/two")
    averages = [name for name in halves[0] if "running" in name]
    assert averages
    for name in averages:
        torch.testing.assert_close(found[name], (halves[0][name] + halves[1][name]) / 2, rtol=1e-4, atol=1e-6)


def draw(file: str) -> int:
    config = resolved(file)
    with distributed.joined(config.device) as (world, device):
        Training(config, Path("unused"), device, world=world)
        print(world.gather(torch.rand(2).tolist()))
    return 0


def test_every_process_draws_random_numbers_of_its_own(quick, tmp_path):
    file = quick(method={"name": "fgsm"})
    first = json.loads(together(tmp_path, draw, str(file), size=4)[0].output.splitlines()[-1])
    again = json.loads(together(tmp_path, draw, str(file), size=4)[0].output.splitlines()[-1])
    assert first == again and len({tuple(numbers) for numbers in first}) == 4
    Training(resolved(file), tmp_path, CPU)
    assert torch.rand(2).tolist() == first[0], "process 0 draws what a single one would"


def test_the_largest_seed_is_one_for_every_process(quick, tmp_path):
    config = resolved(quick(method={"name": "fgsm"}), f"seed={2**31 - 1}")
    drawn = []
    for rank in range(2):
        Training(config, tmp_path, CPU, world=distributed.World(rank, 2))
        drawn.append(torch.rand(1).item())
    assert drawn[0] != drawn[1]


# ---- evaluation


def attack(*argv: str) -> int:
    return cli(["evaluate", *argv])


def test_two_processes_come_to_the_verdicts_of_one(finished_run, tmp_path):
    pytest.importorskip("pyautoattack")
    for name in ("one", "two"):
        shutil.copytree(finished_run, tmp_path / name)
        shutil.rmtree(tmp_path / name / results.FOLDER, ignore_errors=True)
    settings = ["--attack", "pgd-5-3,apgd-ce", "--epsilon", "0.1", "--batch-size", "50", "--json"]
    assert attack(str(tmp_path / "one"), *settings) == 0
    processes = together(tmp_path, attack, str(tmp_path / "two"), *settings)
    assert ended_well(processes)
    one, two = (results.read_all(tmp_path / name / results.FOLDER) for name in ("one", "two"))
    assert len(one) == len(two) == 2
    pgd = [next(r for r in found if r.settings["attack"] == "pgd-5-3") for found in (one, two)]
    assert torch.equal(pgd[0].broken, pgd[1].broken) and pgd[0].broken.any() and pgd[1].facts["finished"]
    assert pgd[0].facts["after_one_restart"] == pgd[1].facts["after_one_restart"]
    told = json.loads(processes[0].output.splitlines()[-1])
    assert told["examples"] == 200 and told["robust_accuracy"] == int(results.worst_case(two).sum()) / 200
    assert processes[1].output == "", "process 0 alone speaks"
    assert "--sanity runs in one process" in together(tmp_path, attack, str(tmp_path / "two"), "--sanity")[0].output


# ---- mistakes


def test_a_mistake_is_said_once(quick, tmp_path):
    file = quick(method=ZERO)
    processes = together(tmp_path, main, str(file), "phases.0.batch_size=21", "name=odd")
    assert [p.status for p in processes] == [2, 2]
    assert "phases.0.batch_size is 21: 2 processes cannot share it equally" in processes[0].output
    assert processes[1].output == "" and not (tmp_path / "runs/odd").exists()
    (tmp_path / "runs/there").mkdir(parents=True)
    (tmp_path / "runs/there" / run_directory.CONFIG).write_text(yaml.safe_dump({}))
    processes = together(tmp_path, main, str(file), "name=there")
    assert [p.status for p in processes] == [2, 2]
    assert "holds a run already" in processes[0].output and processes[1].output == ""


def test_a_dry_run_of_two_processes_shows_one_plan(quick, tmp_path):
    processes = together(tmp_path, main, str(quick(method=ZERO)), "--dry-run")
    assert ended_well(processes)
    assert processes[0].output.count("nothing was written") == 1 and "cpu, 2 processes" in processes[0].output
    assert processes[1].output == "" and not (tmp_path / "runs").exists()


def test_without_torchrun_a_process_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.from_environment() == distributed.ALONE
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert distributed.from_environment() == distributed.ALONE
    assert distributed.ALONE.gather(3) == [3] and distributed.ALONE.total(1, 2.5) == [1, 2.5]
