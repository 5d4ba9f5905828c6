"""What may change when a run is resumed, and what the refusals say to do instead: the commands in them are run."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest
from run_files import assert_explained, summary_of

from fastrobust.__main__ import main as cli
from fastrobust.runtime import run_directory
from fastrobust.train import changes


@pytest.fixture
def run(finished_run, tmp_path):
    """A finished run; its name has a space."""
    return shutil.copytree(finished_run, tmp_path / "my run")


def resume(run, *words) -> int:
    return cli(["train", "--resume", str(run), *words])


def offered(capsys) -> list[list[str]]:
    """The commands that an error offers, as arguments of `fastrobust`."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "fastrobust " in line]
    words = [shlex.split(line) for line in lines]
    return [found[found.index(next(w for w in found if w.endswith("fastrobust"))) + 1 :] for found in words]


def test_the_evaluation_of_an_unfinished_run_can_change(run, capsys):
    (run / "summary.json").unlink()
    before = run_directory.open_run(run)[1]
    assert resume(run, "evaluation.steps=3", "evaluation.epsilon=0.05", "evaluation.limit=30") == 0
    (found,) = summary_of(run)["evaluations"]
    assert (found["attack"], found["epsilon"], found["examples"]) == ("pgd-3-2", 0.05, 30)
    assert found["alpha"] == before.evaluation.alpha_at(0.05)
    text = (run / "config.yaml").read_text()
    for line in ("evaluation.steps: 7 before, 3 now", "evaluation.limit: None before, 30 now"):
        assert f"# changed when the run was resumed: {line}" in text
    assert run_directory.open_run(run)[1].evaluation.steps == 3
    (run / "summary.json").unlink()
    assert resume(run, "evaluation.steps=4") == 0  # a second change keeps the account of the first
    text = (run / "config.yaml").read_text()
    assert "steps: 7 before, 3 now" in text and "steps: 3 before, 4 now" in text
    assert resume(run, "evaluation.steps=4", "seed=0") == 0, "what is no change is no reason to refuse"


def test_a_finished_run_is_evaluated_otherwise_by_the_command_that_is_offered(run, capsys):
    before = (run / "config.yaml").read_bytes(), (run / "summary.json").read_bytes()
    assert resume(run, "evaluation.steps=2", "evaluation.alpha=[0.1, 0.0125]", "evaluation.limit=10") == 2
    commands = offered(capsys)
    assert len(commands) == 2, "one for each step size"
    seen = []
    for command in commands:
        assert cli([*command, "--json"]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        seen.append((found["epsilon"], found["alpha"], found["attack"], found["examples"]))
    assert seen == [(0.1, 0.1, "pgd-2-2", 10), (0.05, 0.0125, "pgd-2-2", 10)]
    assert before == ((run / "config.yaml").read_bytes(), (run / "summary.json").read_bytes())


def test_training_longer_is_a_new_run_from_these_weights(run, tmp_path, capsys):
    assert resume(run, "phases.0.epochs=4") == 2
    (command,) = offered(capsys)
    assert command[-1] == "phases.0.epochs=1", "three of the four are behind us"
    assert cli([*command, "evaluation.restarts=1", "evaluation.steps=1", f"output={tmp_path / 'new'}"]) == 0
    assert "tensors of" in capsys.readouterr().out
    assert summary_of(tmp_path / "new" / "bars_2")["epochs"] == 1


@pytest.mark.parametrize(
    "word, message",
    [
        ("seed=1", "seed: 0 before, 1 now"),
        ("guard.action=warn", "guard.action: stop before, warn now"),
        ("data.limit=50", "data.limit: None before, 50 now"),
        ("schedule.max_lr=0.1", "schedule.max_lr: 0.005 before, 0.1 now"),
        ("name=other", "To move it, move the folder"),
        ("evaluation.steps=none", "evaluation.steps"),
        ("evaluation.stepz=3", "did you mean 'evaluation.steps'?"),
        ("epochs=5", "did you mean 'phases.0.epochs'?"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_what_decides_the_training_is_refused_by_name(run, capsys, word, message, finished):
    if not finished:
        (run / "summary.json").unlink()
    before = {file: file.read_bytes() for file in run.iterdir() if file.is_file()}
    assert_explained(capsys, resume(run, word), message)
    assert before == {file: file.read_bytes() for file in run.iterdir() if file.is_file()}


def test_the_new_run_that_a_refusal_offers_has_the_change(run, capsys):
    assert resume(run, "data.limit=50", "phases.0.batch_size=25") == 2
    (command,) = offered(capsys)
    assert command == ["train", str(run / "config.yaml"), "name=bars_2", "data.limit=50", "phases.0.batch_size=25"]
    assert cli([*command, "--dry-run"]) == 0


def test_a_dry_run_changes_nothing(run, capsys):
    (run / "summary.json").unlink()
    before = (run / "config.yaml").read_bytes()
    assert resume(run, "evaluation.steps=3", "--dry-run") == 0
    assert "PGD-3-2" in capsys.readouterr().out
    assert (run / "config.yaml").read_bytes() == before


def test_a_config_beside_resume_may_have_another_evaluation(quick, tmp_path, capsys):
    file = str(quick())
    assert cli(["train", file]) == 0
    run = tmp_path / "runs" / "bars"
    (run / "summary.json").unlink()
    config = run_directory.open_run(run)[1]
    found, lines = changes.asked_for(run, config, file, ["evaluation.restarts=2"])
    assert lines == ["evaluation.restarts: 1 before, 2 now"]
    assert found == config.model_copy(update={"evaluation": found.evaluation}), "the run's choices stay"
