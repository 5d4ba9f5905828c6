"""Configs by name, from the repository and from a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from run_files import assert_explained

from fastrobust.__main__ import main as cli
from fastrobust.config import packaged, reading

ROOT = Path(__file__).resolve().parents[2]
FILES = {file.relative_to(ROOT).as_posix() for file in (ROOT / "configs").rglob("*.yaml")}


@pytest.mark.parametrize("name", ["mnist_fgsm", "mnist_fgsm.yaml", "configs/mnist_fgsm.yaml"])
def test_a_config_is_found_by_name_in_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert reading.load(name, ["seed=3"]) == reading.load(ROOT / "configs/mnist_fgsm.yaml", ["seed=3"])


def test_a_file_of_the_users_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "configs/mnist_fgsm.yaml").read_text()
    Path("mnist_pgd.yaml").write_text(text)
    assert reading.load("mnist_pgd.yaml").method.name == "fgsm"
    assert reading.load("mnist_pgd").method.name == "pgd"
    assert reading.load("configs/mnist_pgd.yaml").method.name == "pgd"


@pytest.mark.parametrize(
    "name, message",
    [
        ("mnist_fgms", "did you mean mnist_fgsm?"),
        ("birds", "`fastrobust configs` lists those that come with fastrobust"),
        ("other/mnist_fgsm.yaml", "config file other/mnist_fgsm.yaml does not exist"),
    ],
)
def test_what_is_not_there_is_explained(tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.chdir(tmp_path)
    assert_explained(capsys, cli(["train", name, "--dry-run"]), message)


def test_configs_lists_all_with_what_they_give_and_shows_one(capsys):
    assert cli(["configs"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [line for line in lines if line in packaged.names()] == packaged.names() and len(packaged.names()) > 20
    assert max(map(len, lines)) <= 80
    assert "mnist, mnist_net, fgsm at 0.3, 10 epochs" in out and "99.20 % clean" in out
    for name in packaged.names():
        about = packaged.about(packaged.find(name))
        assert about.endswith(".") and about.count("(") == about.count(")") and "python" not in about, name
    assert cli(["configs", "mnist_fgsm"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs/mnist_fgsm.yaml").read_text()
    assert_explained(capsys, cli(["configs", "mnist_fgms"]), "did you mean 'mnist_fgsm'?")


def test_a_wheel_holds_the_configs(tmp_path):
    """Built without the network, unpacked beside nothing else, and asked for a config by name."""
    pytest.importorskip("setuptools", "77")
    source = tmp_path / "source"
    for name in ("fastrobust", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; print(build_meta.build_sdist('.'), build_meta.build_wheel('.'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = source.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        assert {name.removeprefix("fastrobust/") for name in content.namelist()} >= FILES
        content.extractall(tmp_path / "installed")
    (sdist,) = source.glob("*.tar.gz")
    with tarfile.open(sdist) as content:
        assert {name.partition("/")[2] for name in content.getnames()} >= FILES
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-m", "fastrobust", "configs", "mnist_fgsm"]
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout == (ROOT / "configs/mnist_fgsm.yaml").read_text()
