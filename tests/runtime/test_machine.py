"""Tests of fastrobust.runtime.machine: which source a result belongs to, and how much memory may be taken."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest
import torch

from fastrobust.runtime import limits, machine
from fastrobust.runtime.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=nobody", "-c", "user.email=nobody@example.org", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A source tree under git from which the package seems to run."""
    file = tmp_path / "fastrobust" / "runtime" / "machine.py"
    file.parent.mkdir(parents=True)
    file.write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    monkeypatch.setattr(machine, "__file__", str(file))
    return tmp_path


def test_the_commit_is_that_of_the_source_tree_and_says_whether_it_was_changed(tree):
    commit = git(tree, "rev-parse", "HEAD")[:12]
    assert machine.environment("cpu")["commit"] == commit
    (tree / "fastrobust" / "runtime" / "machine.py").write_text("2")
    assert machine.environment("cpu")["commit"] == f"{commit}+"


def test_an_installed_package_has_no_commit_even_below_another_source_tree(tree, monkeypatch):
    installed = tree / "site-packages" / "fastrobust" / "runtime" / "machine.py"
    monkeypatch.setattr(machine, "__file__", str(installed))
    assert machine.environment("cpu")["commit"] is None


def test_this_checkout_has_a_commit():
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a checkout")
    assert machine.environment("cpu")["commit"].removesuffix("+") == git(ROOT, "rev-parse", "HEAD")[:12]


def test_the_environment_names_versions_and_hardware():
    found = machine.environment("cpu")
    assert found["versions"]["torch"] == torch.__version__ and "numpy" in found["versions"]
    assert found["hardware"]["cores"] == limits.cores() >= 1
    assert found["hardware"]["threads"] == torch.get_num_threads()


def test_what_needs_most_of_the_memory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  2000 kB\nMemAvailable:  1000 kB\n")
    monkeypatch.setattr(limits, "ROOT", tmp_path)
    assert limits.available_memory() == 1000 * 1024
    machine.check_memory(800 * 1024, "the images")
    with pytest.raises(DataError, match=r"the images needs .*more than 80 %.*set a `limit`"):
        machine.check_memory(801 * 1024, "the images")
    monkeypatch.setattr(limits, "ROOT", tmp_path / "absent")
    assert limits.available_memory() == math.inf
    machine.check_memory(10**18, "the images")
