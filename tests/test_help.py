"""`--help` of every command answers at once, and importing fastrobust costs next to nothing."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys

import pytest
from run_files import assert_explained

from fastrobust.__main__ import KEYS, MEANT, WORK, Parser, add_command, parse
from fastrobust.__main__ import main as cli
from fastrobust.config import packaged, reading

HEAVY = {"torch", "torchvision", "numpy", "pydantic", "rich", "tensorboard", "yaml", "PIL", "safetensors"}


def cpu_seconds_of(*command: str) -> tuple[float, str]:
    """(user and system time, what it printed) of a process that ends well: a busy machine makes neither longer."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    out = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_utime + used.ru_stime, out


@pytest.mark.parametrize("name", ["", *WORK])
def test_help_answers_at_once(name):
    seconds, out = cpu_seconds_of(sys.executable, "-m", "fastrobust", *name.split(), "--help")
    assert out.startswith(f"usage: fastrobust {name}".strip())
    assert seconds < 0.3
    if not name:
        for command, (_, told) in WORK.items():
            assert re.search(rf"^ +{command} +{told[:40]}", out, re.M)


@pytest.mark.parametrize("name", WORK)
def test_help_has_examples_that_can_be_parsed_and_fits_80_columns(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        parse([name, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and max(map(len, out.splitlines())) <= 80
    examples = re.findall(rf"^  fastrobust ({name} .*|{name})$", out, re.M)
    assert examples
    for example in examples:
        parse(example.split())
    if name in ("train", "lr-range"):
        assert "phases.0.epochs" in out and all(config in out for config in packaged.names())


def test_the_keys_in_the_help_are_keys():
    words = [word for line in KEYS.splitlines() if line.startswith("  ") for word in line.split()]
    config = reading.load("mnist_fgsm").to_dict()
    assert len(words) > 12 and set(words) | set(MEANT.values()) <= reading.flatten(config).keys() | {"evaluation.epsilon"}


@pytest.mark.parametrize(
    "words, message",
    [
        ("train quickstart --epsilon 0.1", "A key of the config is written without dashes: epsilon=0.1"),
        ("train quickstart --epochs 3", "without dashes: phases.0.epochs=3"),
        ("train quickstart --batch_size=64", "without dashes: phases.0.batch_size=64"),
        ("train --config quickstart", "A config is named without an option: fastrobust train CONFIG"),
        ("train quickstart --dry-rn", "did you mean '--dry-run'?"),
        ("evaluate runs/x epsilon=0.1", "An option is written with dashes: --epsilon 0.1"),
        ("evaluate runs/x batch_size=5", "--batch-size 5"),
    ],
)
def test_keys_and_options_are_told_apart(capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        cli(words.split())
    err = capsys.readouterr().err
    assert caught.value.code == 2 and message in err


def test_every_path_on_the_command_line_is_written_out(monkeypatch, capsys):
    """Not every shell writes out `--output=~/x`, and none does between quotes: a folder called `~` is made."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DISK", "/disk")
    tried = []
    for name in WORK:
        commands = Parser()
        add_command(commands, name)
        for action in commands._actions:
            if action.metavar in ("RUN", "RUN2", "PATH", "DIR", "FILE", "FOLDER", "SWEEP"):
                assert action.type and action.type("~/x") == "/home/me/x" and action.type("$DISK/x") == "/disk/x"
                tried.append(f"{name} {action.dest}")
    assert len(tried) >= 19, tried
    for argument, told in (("--output=~nobody-here/x", "no home folder"), ("--output=$ABSENT/x", "ABSENT is not set")):
        with pytest.raises(SystemExit):
            parse(["export", "runs/a", argument])
        assert told in capsys.readouterr().err


REQUIRED = {"sweep": ["x.yaml"], "train": ["x.yaml"], "lr-range": ["x.yaml"], "prepare": ["ffcv", "mnist"], "configs": []}


@pytest.mark.parametrize("name", WORK)
def test_parsing_a_command_imports_the_standard_library_alone(name):
    options = [name, *REQUIRED.get(name, ["runs/x"]), *(["--epsilon", "8/255"] if name in ("verify", "evaluate") else [])]
    code = (
        f"import sys; from fastrobust.__main__ import parse; parse({options!r}); "
        "print(*{m.partition('.')[0] for m in sys.modules})"
    )
    seconds, out = cpu_seconds_of(sys.executable, "-c", code)
    assert "fastrobust" in out.split() and not HEAVY & set(out.split())
    assert seconds < 0.3


def test_every_command_is_where_the_table_says():
    for name, (module, _) in WORK.items():
        assert callable(importlib.import_module(module).command), name


def test_importing_fastrobust_is_quick():
    code = (
        "import sys, time; before = time.process_time(); import fastrobust; print(time.process_time() - before, "
        "*{m.partition('.')[0] for m in sys.modules})"
    )
    _, out = cpu_seconds_of(sys.executable, "-c", code)
    seconds, *modules = out.split()
    assert "fastrobust" in modules and not HEAVY & set(modules)
    assert float(seconds) < 0.1


def test_an_unknown_command_and_none_are_explained(capsys):
    for argv, message in ((["evalute", "runs/x"], "invalid choice: 'evalute'"), ([], "required: COMMAND")):
        with pytest.raises(SystemExit) as caught:
            cli(argv)
        assert_explained(capsys, caught.value.code, message)
