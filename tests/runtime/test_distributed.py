"""Several processes against one: the same weights, the same verdicts, the same bits after interruptions, and no hang."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from fastrobust.__main__ import main as cli
from fastrobust.config import reading
from fastrobust.config.schema import Config
from fastrobust.data import loaders
from fastrobust.data.augment import to_unit
from fastrobust.evaluation import results
from fastrobust.models.weights import read_weights
from fastrobust.runtime import distributed, run_directory
from fastrobust.runtime.command import main_with_errors
from fastrobust.train import checkpoint
from fastrobust.train.training import Training
from tests.stress import child
from tests.stress.ranks import together

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SGD = {"optimizer": {"name": "sgd"}, "schedule": {"name": "cyclic", "max_lr": 0.02}}
ZERO = {"name": "fgsm", "init": "zero"}


def main(*argv: str) -> int:
    return cli(["train", *argv])


@pytest.fixture(scope="session")
def small_run(config_file, few_bars):
    """small_run(folder, **changes) -> a config file of a run of seconds, 4, 3 and 3 steps; it goes to folder/runs/bars."""

    def make(folder: Path, **changes) -> Path:
        phases = [{"epochs": 3, "batch_size": 20, "resolution": 28}]
        small = {"data__path": str(few_bars), "data__limit": 65, "phases": phases, **SGD}
        return config_file(folder, **(small | {"evaluation": {"steps": 3, "restarts": 2, "limit": 20}} | changes))

    return make


@pytest.fixture
def quick(small_run, tmp_path):
    return lambda **changes: small_run(tmp_path, **changes)


def ended_well(processes: list[child.Ended]) -> bool:
    assert [p.status for p in processes] == [0] * len(processes), "\n".join(p.output for p in processes)
    return True


def resolved(file: str | Path, *changes: str) -> Config:
    return loaders.resolve(reading.load(file, changes), CPU)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return read_weights(directory)[0].state_dict()


def same_bits(a: Path, b: Path) -> bool:
    """Weights and every figure but the times."""
    one, other = weights(a), weights(b)
    lines = [[json.loads(line) for line in (d / run_directory.METRICS).read_text().splitlines()] for d in (a, b)]
    plain = [[{k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in part] for part in lines]
    return plain[0] == plain[1] and all(torch.equal(one[name], other[name]) for name in one)


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


# ---- interruptions

LONG = {
    "data__limit": 70,
    "data__held_out": 4,
    "phases": [{"epochs": 4, "batch_size": 4, "resolution": 28}],  # 17 steps: the processes agree after 16, too
    "selection": {"steps": 2},
    "averaging": {"decay": 0.5},
    "method": {"name": "fgsm", "init": "previous"},
    "model__name": "preact_resnet18_w16",
    "data__augment": {"crop": "none", "flip": True},
}


@pytest.fixture(scope="module")
def undisturbed(small_run, tmp_path_factory):
    """The directory of a longer run, done by two processes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert ended_well(together(folder, main, str(small_run(folder, **LONG)), "name=undisturbed"))
    return folder / "runs/undisturbed"


def begun(directory: Path):
    return lambda: (directory / run_directory.CHECKPOINT).exists()


def test_a_signal_to_one_process_stops_all_and_they_go_on_with_the_same_bits(quick, undisturbed, tmp_path):
    file, expected = quick(**LONG), undisturbed
    directory = tmp_path / "runs/stopped"
    processes = together(tmp_path, main, str(file), "name=stopped", when=begun(directory), signum=signal.SIGTERM)
    assert [p.status for p in processes] == [75, 75], "\n".join(p.output for p in processes)
    assert "stopped by SIGTERM; go on with" in processes[0].output
    position = run_directory.load_checkpoint(directory)[1]["position"]
    assert (position["pass"], position["step"]) != (0, 0) and not (directory / run_directory.SUMMARY).exists()
    assert ended_well(together(tmp_path, main, "--resume", str(directory)))
    assert same_bits(directory, expected)


def test_a_lost_process_ends_the_others_and_the_run_goes_on_with_the_same_bits(quick, undisturbed, tmp_path):
    file, expected = quick(**LONG), undisturbed
    directory = tmp_path / "runs/lost"
    processes = together(tmp_path, main, str(file), "name=lost", when=begun(directory), signum=signal.SIGKILL, limit=60)
    assert [p.status for p in processes] == [75, -signal.SIGKILL], "\n".join(p.output for p in processes)
    assert "another process was lost" in processes[0].output and "--resume" in processes[0].output
    assert "Traceback" not in processes[0].output
    assert ended_well(together(tmp_path, main, "--resume", str(directory)))
    assert same_bits(directory, expected)


def vanish() -> int:
    """Process 1 dies where nothing is trained yet."""

    def command() -> int:
        with distributed.joined("cpu") as (world, _):
            if world.rank:
                os.kill(os.getpid(), signal.SIGKILL)
            world.gather(None)
        return 0

    return main_with_errors(command)


def test_a_process_that_is_lost_before_training_is_one_line_too(tmp_path):
    first, _ = together(tmp_path, vanish, limit=60)
    assert first.status == 75 and len(first.output.splitlines()) == 1 and "another process was lost" in first.output


def test_a_run_goes_on_with_another_number_of_processes(quick, tmp_path, capfd):
    directory = tmp_path / "runs/changed"
    together(tmp_path, main, str(quick(**LONG)), "name=changed", when=begun(directory), signum=signal.SIGTERM)
    assert main("--resume", str(directory)) == 0
    assert "begun by 2 process(es), now 1" in capfd.readouterr().out
    assert len((directory / run_directory.METRICS).read_text().splitlines()) == 4


def test_torchrun_starts_lost_processes_again(quick, undisturbed, tmp_path):
    """The real launcher. One process is killed; `--max-restarts` brings the run to the end of an undisturbed one."""
    file = quick(**LONG)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    directory, log = tmp_path / "runs/killed", tmp_path / "killed.log"
    with open(log, "w") as output:
        command = [*launch, "-m", "fastrobust.train", str(file), "name=killed"]
        job = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    while not begun(directory)() and job.poll() is None:
        time.sleep(0.02)
    workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert job.wait(timeout=180) == 0, log.read_text()
    assert "going on after" in log.read_text()
    assert same_bits(directory, undisturbed)


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
