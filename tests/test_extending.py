"""Parts of the user's own, from modules outside of the package: the examples of docs/extending.md are copied into an empty
folder, trained, interrupted, evaluated and evaluated again through the commands."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fastrobust.__main__ import main as cli
from fastrobust.config import parts, reading
from fastrobust.config.datasets import DATASETS, FROM_FILES
from fastrobust.evaluation import results
from fastrobust.runtime import run_directory
from fastrobust.train.step import Step

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(file.stem for file in (ROOT / "examples").glob("own_*.py"))


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """outside(module, …) copies examples into tmp_path, which is the current folder and the first place for imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def forget():
        for name in [name for name in sys.modules if name in EXAMPLES]:
            del sys.modules[name]

    forget()
    yield lambda *modules: [shutil.copy(ROOT / f"examples/{module}.py", tmp_path) for module in modules]
    forget()


@pytest.fixture
def run(settings, few_bars, tmp_path):
    """run(name, **changes) trains the config that `settings` makes of the changes, and returns (directory, summary)."""

    def made(name: str = "own", **changes) -> tuple[Path, dict]:
        small = {"data__path": str(few_bars), "phases": [{"epochs": 2, "batch_size": 20, "resolution": 28}]}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings(tmp_path / "runs", **(small | {"name": name} | changes))))
        assert cli(["train", str(file)]) == 0
        return tmp_path / "runs" / name, json.loads((tmp_path / "runs" / name / "summary.json").read_text())

    return made


@pytest.fixture
def evaluate(capsys):
    """evaluate(directory, *options) -> what the command found."""

    def made(directory: Path, *options) -> dict:
        capsys.readouterr()
        assert cli(["evaluate", str(directory), *map(str, options), "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return made


def assert_evaluated_again(found: dict, summary: dict) -> None:
    first = summary["evaluations"][0]
    for key in ("clean_accuracy", "robust_accuracy", "examples", "epsilon", "attack"):
        assert found[key] == first[key]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """What training left behind: model, optimiser and the method's state, at the end."""
    tensors = run_directory.load_checkpoint(directory)[0]
    return {name: t for name, t in tensors.items() if name.startswith(("learner.", "state."))}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stopped_at(monkeypatch, at: int) -> None:
    """SIGTERM arrives in the middle of training step number `at` of this process."""
    take, taken = Step.take, []

    def watched(self, batch):
        taken.append(1)
        if len(taken) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        take(self, batch)

    monkeypatch.setattr(Step, "take", watched)


# ---- a method with a perturbation for every image


REMEMBERED = {"method": {"name": "own_method:Remembered"}, "phases": [{"epochs": 3, "batch_size": 20, "resolution": 28}]}


def test_a_method_keeps_what_it_found_for_each_image(outside, run, evaluate):
    outside("own_method")
    directory, summary = run(**REMEMBERED)
    assert summary["method"] == "own_method:Remembered"
    tensors, facts = run_directory.load_checkpoint(directory)
    delta = tensors["state.delta"]
    assert delta.shape == (70, 3, 28, 28) and facts["examples"] == 70
    largest = delta.abs().flatten(1).amax(1)
    assert largest.min() > 0.01 and largest.max() <= 0.05  # every image has one, within epsilon
    assert len({row.numpy().tobytes() for row in delta}) == 70
    stored = yaml.safe_load((directory / "config.yaml").read_text())["method"]
    assert stored == {"name": "own_method:Remembered", "attack_batchnorm": "train", "alpha": 0.0625}
    assert_evaluated_again(evaluate(directory), summary)


def test_a_method_resumes_within_an_epoch(outside, run, evaluate, monkeypatch, tmp_path):
    """Bit for bit; and without what it had found, training ends elsewhere."""
    outside("own_method")
    reference, _ = run("reference", **REMEMBERED)
    stopped_at(monkeypatch, 6)  # an epoch has 4 batches, the second begins with the last images of the first
    with pytest.raises(AssertionError):
        run("stopped", **REMEMBERED)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "runs/stopped"
    tensors, facts = run_directory.load_checkpoint(directory)
    assert facts["position"]["step"] == 6 and not (directory / "summary.json").exists()
    assert bool((tensors["state.delta"].flatten(1) != 0).any(1).all())  # the first epoch has been through all images

    forgotten = shutil.copytree(directory, tmp_path / "runs/forgotten")
    config = yaml.safe_load((forgotten / "config.yaml").read_text()) | {"name": "forgotten"}
    (forgotten / "config.yaml").write_text(yaml.safe_dump(config))
    zeros = torch.zeros_like(tensors["state.delta"])
    run_directory.save_checkpoint(forgotten, tensors | {"state.delta": zeros}, facts)

    for place in (directory, forgotten):
        assert cli(["train", "--resume", str(place)]) == 0
    assert same(weights(directory), weights(reference))
    assert not same(weights(forgotten), weights(reference))
    summaries = [json.loads((place / "summary.json").read_text()) for place in (directory, reference)]
    assert_evaluated_again(evaluate(directory), summaries[1])
    assert summaries[0]["evaluations"][0]["robust_accuracy"] == summaries[1]["evaluations"][0]["robust_accuracy"]


def test_a_method_that_makes_no_update_is_explained(outside, config_file, few_bars, tmp_path, capsys):
    (tmp_path / "idle.py").write_text(
        "from fastrobust.train.methods.base import Method\n\n\nclass Idle(Method):\n"
        "    def step(self, learner, batch, threat, scale, state):\n        learner.forward(batch.x)\n"
    )
    file = str(config_file(tmp_path, method={"name": "idle:Idle"}, data__path=str(few_bars)))
    for command in (["train", file], ["lr-range", file, "--output", str(tmp_path / "page.html")]):
        assert cli(command) == 2
        told = "error: method.name: the step of idle:Idle made no update: it must call learner.update(x, y), which"
        assert told in capsys.readouterr().err


# ---- an attack


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ("None", "None"),
        ("y < 0", "bool {n}"),
        ("[1, 2]", "a int and a int"),
        ("(y < 0, x[:, :1])", "bool {n} and float32 {n} x 1 x 28 x 28"),
        ("(y, x)", "int64 {n} and float32 {n} x 3 x 28 x 28"),
        ("1 / 0", None),
    ],
)
def test_what_an_attack_must_return_is_said(outside, finished_run, tmp_path, monkeypatch, capsys, returned, told):
    """And one that fails in its first call leaves no record."""
    (tmp_path / "odd.py").write_text(
        "from fastrobust.attack.base import Attack\n\n\nclass Odd(Attack):\n"
        f"    def run(self, x, y, start):\n        return {returned}\n"
    )
    monkeypatch.delitem(sys.modules, "odd", raising=False)
    directory = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(directory / "evaluations", ignore_errors=True)
    command = ["evaluate", str(directory), "--attack", "odd:Odd"]
    if told is None:
        with pytest.raises(ZeroDivisionError):
            cli(command)
    else:
        assert cli(command) == 2
        says = r"error: attack: run of Odd must return \(survived, points\), bool (\d+) and .*"
        error = re.search(says, capsys.readouterr().err)
        assert error[0].endswith(f"float {error[1]} x 3 x 28 x 28 here; it returned {told.format(n=error[1])}")
    assert not list((directory / "evaluations").iterdir())


def test_an_attack_by_name(outside, run, evaluate, monkeypatch):
    outside("own_attack")
    directory, _ = run(epsilon=0.3, evaluation={"epsilon": 0.3, "steps": 5, "restarts": 1})
    alone = evaluate(directory, "--attack", "own_attack:Corners-3")
    assert alone["attack"] == "own_attack:Corners-3" and alone["robust_accuracy"] <= alone["clean_accuracy"]
    (attack,) = alone["attacks"]
    assert attack["attacked"] == round(alone["clean_accuracy"] * alone["examples"]) and attack["refused"] == 0
    more = evaluate(directory, "--attack", "own_attack:Corners-40")
    assert more["robust_accuracy"] < alone["clean_accuracy"]  # corners do break this model
    both = evaluate(directory, "--attack", "own_attack:Corners-40,pgd-5-1")
    assert [part["attack"] for part in both["attacks"]] == ["own_attack:Corners-40", "pgd-5-1"]
    assert both["attacks"][1]["attacked"] == round(more["robust_accuracy"] * more["examples"])

    kept = [record for record in results.read_all(directory / "evaluations") if "Corners" in record.settings["attack"]]
    assert {record.settings["made_by"].split()[0] for record in kept} == {"own_attack"}
    assert not any("alpha" in record.settings for record in kept)
    import own_attack

    monkeypatch.setattr(own_attack.Corners, "run", None)
    assert evaluate(directory, "--attack", "own_attack:Corners-40")["attacks"] == more["attacks"]  # not run again


def test_an_attack_is_not_believed(outside, run, evaluate, tmp_path, capsys):
    """Success outside of the ball is refused; wrong numbers and what is no attack are explained."""
    outside("own_attack")
    (tmp_path / "liar.py").write_text(
        "from own_attack import Corners\n\n\nclass Liar(Corners):\n"
        "    def run(self, x, y, start):\n        return y < 0, 1 - x\n"
    )
    directory, _ = run()
    found = evaluate(directory, "--attack", "liar:Liar-1")
    assert found["robust_accuracy"] == found["clean_accuracy"] > 0
    assert found["attacks"][0]["refused"] == found["attacks"][0]["attacked"]
    mistakes = {"Corners": "Corners-TRIES", "torch": "derive", "Attack": "lacks run"}
    for name, words in mistakes.items():
        assert cli(["evaluate", str(directory), "--attack", f"own_attack:{name}"]) == 2
        assert words in capsys.readouterr().err
    del sys.modules["liar"]


# ---- a model, a data set, a loader


def test_a_model(outside, run, evaluate, capsys, tmp_path):
    outside("own_model")
    directory, summary = run(model={"name": "own_model:small_net"})
    assert summary["model"] == "own_model:small_net"
    assert_evaluated_again(evaluate(directory), summary)
    shapes = {name: tuple(t.shape) for name, t in weights(directory).items()}
    assert shapes["learner.model.network.0.weight"] == (8, 3, 3, 3)
    assert shapes["learner.model.network.6.weight"] == (10, 256)

    (tmp_path / "own_model.py").unlink()  # later, elsewhere
    del sys.modules["own_model"]
    assert cli(["evaluate", str(directory)]) == 2
    assert "there is no module 'own_model'" in capsys.readouterr().err


def test_a_data_set(outside, run, evaluate, tmp_path):
    outside("own_data")
    changes = {"data": {"dataset": "own_data:SQUARES"}, "model__name": "own_model:small_net", "epsilon": 0.1}
    outside("own_model")
    phases = [{"epochs": 4, "batch_size": 20}]
    directory, summary = run(**changes, phases=phases, evaluation={"steps": 3, "restarts": 1, "limit": 30})
    assert (summary["dataset"], summary["examples"], summary["training_images"]) == ("own_data:SQUARES", 30, 200)
    assert summary["clean_accuracy"] > 0.5  # of four classes
    assert_evaluated_again(evaluate(directory), summary)
    assert json.loads(header(directory)["classes"]) == ["top left", "top right", "bottom left", "bottom right"]

    import own_data

    asked = []
    read, dataset = own_data.read, own_data.SQUARES
    object.__setattr__(dataset, "read", lambda split, path: asked.append((split, path)) or read(split, path))
    found = evaluate(directory, "--data", tmp_path / "elsewhere", "--limit", 80)
    assert found["examples"] == 80 and asked == [("test", str(tmp_path / "elsewhere"))]


def header(directory: Path) -> dict:
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return file.metadata()


def test_a_loader_gives_what_the_others_give(outside, run, evaluate, photos):
    """Photos of many sizes, cropped at random: the weights are those of a run with `loader: torch`, bit for bit."""
    outside("own_loader")
    changes = {
        "data": {"dataset": "image_folder", "path": str(photos), "augment": {"crop": "random_resized", "flip": True}},
        "model__name": "preact_resnet18_w16",
        "phases": [{"epochs": 2, "batch_size": 10, "resize": "original", "resolution": 16}],
        "evaluation": {"steps": 2, "restarts": 1},
    }
    directory, summary = run(loader="own_loader:OneByOne", **changes)
    other, expected = run("torch", loader="torch", **changes)
    assert summary["loader"] == "own_loader:OneByOne" and summary["training_images"] == 37
    assert same(weights(directory), weights(other))
    assert_evaluated_again(evaluate(directory), expected)


# ---- all of them at once, as examples/own_parts.yaml has them


def test_all_parts_together_resume_within_an_epoch(outside, evaluate, monkeypatch, tmp_path, capsys):
    outside(*EXAMPLES)
    shutil.copy(ROOT / "examples/own_parts.yaml", tmp_path)
    assert cli(["train", "own_parts.yaml", "device=cpu"]) == 0
    reference = tmp_path / "runs/own_parts"
    summary = json.loads((reference / "summary.json").read_text())
    assert summary["clean_accuracy"] > 0.95 and summary["robust_accuracy"] > 0.9  # 1 and 0.975 stand in the config's head
    assert_evaluated_again(evaluate(reference), summary)

    config = reading.load("own_parts.yaml")
    rates = [json.loads(line)["learning_rate"] for line in (reference / "metrics.jsonl").read_text().splitlines()]
    ends = [config.schedule.rate(epoch - 0.05, 8) for epoch in range(1, 9)]  # 10 updates in an epoch: the middle of the last
    assert rates == pytest.approx(ends, rel=1e-5) and rates == sorted(rates, reverse=True)
    optimizer = {name.rpartition(".")[2] for name in weights(reference) if ".optimizer." in name}
    assert optimizer == {"exp_avg", "exp_avg_sq", "step"}

    stopped_at(monkeypatch, 33)
    assert cli(["train", "own_parts.yaml", "device=cpu", "name=stopped"]) == 75
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with Path("own_model.py").open("a") as file:
        file.write("\n# a remark\n")
    capsys.readouterr()
    assert cli(["train", "--resume", "runs/stopped"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "code" in line]
    assert told == [
        f"warning: runs/stopped: own_model:small_net: its code in {tmp_path}/own_model.py is not what the run was begun with"
    ]
    code = json.loads((reference / "environment.json").read_text())["code"]
    named = ("loader:OneByOne", "data:SQUARES", "model:small_net", "method:Remembered", "optimizer:AdamW", "schedule:Cosine")
    assert code.keys() == {f"own_{name}" for name in named}
    method = (ROOT / "examples/own_method.py").read_bytes()
    assert code["own_method:Remembered"]["sha256"] == hashlib.sha256(method).hexdigest()
    assert same(weights(tmp_path / "runs/stopped"), weights(reference))
    for command in (["report", "-o", "page.html", "--limit", "8"], ["export", "-o", "exported"]):
        capsys.readouterr()
        assert cli([command[0], "runs/own_parts", *command[1:]]) == 0, capsys.readouterr().err


# ---- the page


def test_the_page_shows_the_files_that_are_run():
    """Every example file stands in docs/extending.md as it is, under its own name."""
    text = (ROOT / "docs/extending.md").read_text()
    shown = dict(re.findall(r"`examples/(own_\w+)\.py`[^`]*```python\n(.*?)```", text, re.DOTALL))
    assert shown == {name: (ROOT / f"examples/{name}.py").read_text() for name in EXAMPLES}
    assert f"```yaml\n{(ROOT / 'examples/own_parts.yaml').read_text()}```" in text


def test_the_page_names_every_part():
    """The table of names is that of the code."""
    text = (ROOT / "docs/extending.md").read_text()
    table = re.findall(r"^\| `([\w.-]+)` \| (.*?) \|", text, re.M)
    rows = {key: set(re.findall(r"`([^`]+)`", names)) for key, names in table}
    assert rows["method.name"] == parts.METHODS.keys()
    assert rows["optimizer.name"] == parts.OPTIMIZERS.keys()
    assert rows["schedule.name"] == parts.SCHEDULES.keys()
    assert rows["data.dataset"] == {*DATASETS, *FROM_FILES}
    assert rows["loader"] == {"auto", *parts.LOADERS}
    assert rows["--attack"] >= parts.ATTACKS.keys()
    assert rows["model.name"] >= parts.MODELS.keys()


def test_the_hops_of_a_batch_exist():
    """At most 15, and each names code that is there."""
    import importlib

    text = (ROOT / "docs/extending.md").read_text()
    section = text[text.index("## From a file to a weight update") :]
    hops = re.findall(r"^(\d+)\. (.*(?:\n   .*)*)", section, re.M)
    assert [int(number) for number, _ in hops] == list(range(1, len(hops) + 1)) and 8 <= len(hops) <= 15
    for _, hop in hops:
        names = re.findall(r"`([\w/]+\.py)`: `(\w+)(?:\.(\w+))?`", hop)
        assert names, hop
        for file, name, method in names:
            found = getattr(importlib.import_module("fastrobust." + file.removesuffix(".py").replace("/", ".")), name)
            assert not method or hasattr(found, method), hop
