"""README.md, docs/ and benchmarks/RECORDS.md name commands, files, links and keys that exist, and the defaults that hold."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import re
import runpy
import shlex
import typing
from pathlib import Path
from typing import Literal

import pydantic
import pytest
import torch

from fastrobust.__main__ import OPTIONS, parse
from fastrobust.config import keys, parts, reading
from fastrobust.config.fields import Count, NonNegative, Number, Pixels, Positive, Section, key

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/RECORDS.md"]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PLACE = re.compile(r"[\w.-]+/[\w./-]*")
NUMBERS = {"N", "SECONDS", "EPSILON"}  # that a reader puts in
ROOMS = {"fastrobust", "tests", "docs", "configs", "benchmarks", "data_prep", "examples"}
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z_\d]+\b|…|<")  # RUN, CONFIG.yaml: to be filled in by the reader


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(page.read_text()) if found == language]


def in_backticks(page: Path) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", page.read_text()))]


def commands(page: Path) -> list[str]:
    """The lines of code blocks without a language, continued lines joined and comments left out, and what stands in
    backticks."""
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    return [line.strip() for text in (*lines, *in_backticks(page)) if (line := re.sub(r"(^|\s)#.*", "", text))]


def fastrobust_command(command: str) -> list[str] | None:
    """The arguments of `fastrobust` in a command, or None for another command."""
    words = shlex.split(command) if re.match(r"[A-Z_]+=|time |fastrobust |python |torchrun ", command) else []
    while words and (words[0] == "time" or re.fullmatch(r"[A-Z_]+=.*", words[0])):
        words.pop(0)
    if words[:1] == ["fastrobust"] and len(words) > 1:
        return words[1:]
    if words[:1] == ["python"] and words[1:2] and (wrote := re.fullmatch(r"data_prep/write_(ffcv|dali)\.py", words[1])):
        return ["prepare", wrote[1], *words[2:]]
    if words[:1] in (["python"], ["torchrun"]) and "-m" in words:
        module, *arguments = words[words.index("-m") + 1 :]
        if module == "fastrobust":
            return arguments
        if module == "fastrobust.train":
            return ["train", *arguments]
    return None


def module_command(command: str) -> tuple[str, list[str]] | None:
    """The module and the arguments of another `python -m` command."""
    found = re.match(r"(?:[A-Z_]+=\S+ )*python -m ([\w.]+)(.*)", command)
    return (found[1], shlex.split(found[2])) if found and found[1].partition(".")[0] in ("benchmarks", "tests") else None


@pages
def test_commands_have_the_options_that_they_are_given(page, capsys):
    for command in commands(page):
        name, *arguments = fastrobust_command(command) or [None]
        if name is None:
            continue
        assert name in OPTIONS, f"{page.name}: {command}"
        if not arguments or "…" in arguments:  # spoken of, not shown: its options exist
            alone = argparse.ArgumentParser()
            OPTIONS[name](alone)
            assert {word for word in arguments if word.startswith("-")} <= alone._option_string_actions.keys(), command
            continue
        try:
            parse([name, *("1" if word in NUMBERS else word for word in arguments)])
        except SystemExit:
            pytest.fail(f"{page.name}: {command}\n{capsys.readouterr().err}")


def test_every_command_is_documented():
    found = [fastrobust_command(command) or [None] for page in PAGES[:-1] for command in commands(page)]
    assert {name for name, *arguments in found if arguments} >= OPTIONS.keys()


@pages
def test_configs_in_commands_can_be_read(page):
    """With the changes that stand behind them."""
    for command in commands(page):
        name, *arguments = fastrobust_command(command) or [None]
        if name not in ("train", "lr-range") or not arguments or "…" in arguments:
            continue
        found = parse([name, *arguments])
        if found.config and found.config.startswith("configs/") and not PLACEHOLDER.search(found.config):
            reading.load(ROOT / found.config, [change for change in found.overrides if not PLACEHOLDER.search(change)])


GONE = {"python -m benchmarks.loader --formats"}  # named with the commit that had it


@pages
def test_modules_in_commands_exist_and_have_the_options(page):
    known = "".join(file.read_text() for file in (*ROOT.glob("benchmarks/*.py"), ROOT / "tests/stress/__main__.py"))
    for command in commands(page):
        if (found := module_command(command)) is None or command in GONE:
            continue
        module, arguments = found
        assert importlib.util.find_spec(module) is not None, f"{page.name}: {command}"
        for word in arguments:
            assert not word.startswith("--") or f'"{word}"' in known, f"{page.name}: {command}: {word}"


def test_makefile_has_the_targets_that_are_named():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for command in commands(page):
            if command.startswith("make "):
                assert command.split()[1] in targets, f"{page.name}: {command}"


@pages
def test_files_in_backticks_exist(page):
    for text in in_backticks(page):
        if PLACE.fullmatch(text) and text.split("/")[0] in ROOMS and not PLACEHOLDER.search(text):
            assert (ROOT / text).exists(), f"{page.name} names {text}"


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{page.name} links to {target}"


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pages
def test_the_rows_of_a_table_have_as_many_cells_as_its_head(page):
    for table in re.findall(r"(?:^\|.*\n)+", FENCE.sub("", page.read_text()), re.MULTILINE):
        head, *rest = [line.replace("\\|", "").count("|") for line in table.splitlines()]
        assert set(rest) == {head}, f"{page.name}: {table.splitlines()[0]}"


@pages
def test_python_parses_and_imports_what_exists(page):
    for text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastrobust":
                module = importlib.import_module(node.module)
                for name in node.names:
                    if not hasattr(module, name.name):
                        importlib.import_module(f"{node.module}.{name.name}")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_the_readmes_example_can_be_configured():
    """The config, and the model function that stands below it."""
    (text,) = blocks(ROOT / "README.md", "yaml")
    config = reading.parse(reading.read_yaml(text, "README.md") | {"name": "birds"}, "README.md")
    place: dict[str, typing.Any] = {}
    exec(compile(blocks(ROOT / "README.md", "python")[0], "README.md", "exec"), place)
    module, _, function = config.model.name.partition(":")
    side = config.phases[0].resolution
    assert module == "my_models"
    assert place[function](3, 7)(torch.zeros(2, 3, side, side)).shape == (2, 7)


# ---- docs/configuration.md and the schema


CONFIGURATION = runpy.run_path(str(ROOT / "docs/configuration.py"))


def test_the_tables_of_keys_are_those_of_the_schema():
    text = (ROOT / "docs/configuration.md").read_text()
    assert CONFIGURATION["page"](text) == text, "docs/configuration.md is not up to date: python docs/configuration.py"


def test_a_key_that_no_table_names_is_told():
    text = (ROOT / "docs/configuration.md").read_text()
    for gone in ("<!-- keys: guard -->", "clip_gradients "):
        with pytest.raises(SystemExit, match=r"guard\.action|clip_gradients"):
            CONFIGURATION["page"](text.replace(gone, "", 1))
    with pytest.raises(SystemExit, match=r"seed in one table"):
        CONFIGURATION["page"](text.replace("<!-- keys: guard -->", "<!-- keys: guard seed -->"))


@pytest.mark.parametrize(
    ("kind", "limits", "told"),
    [
        (bool, {}, "`true`, `false`"),
        (Literal["a", False] | None, {}, "`a`, `false`"),
        (NonNegative, {}, "0 or more"),
        (Positive | None, {}, "above 0"),
        (Number, {"ge": 0, "lt": 1}, "0 to below 1"),
        (Number, {"gt": 0, "le": 0.5}, "above 0, up to 0.5"),
        (Pixels | None, {}, "pixels"),
        (Count, {"values": "images"}, "images"),
        (tuple[Literal["a", "b"], ...], {}, "list of `a`, `b`"),
    ],
)
def test_values_are_told_by_the_type(kind, limits, told):
    section = pydantic.create_model("A", __base__=Section, a=(kind, key("its meaning", **limits)))
    field = section.model_fields["a"]
    assert CONFIGURATION["values"](field.annotation, field.title, field.metadata) == told


def test_defaults_that_are_told_in_words_are_what_a_config_resolves_to():
    """Those of the methods, at 8/255 and at 16/255: `1.25 epsilon`, `epsilon / 4`, `20; 10 where epsilon is above 8/255`."""
    seen = 0
    for one in keys.every():
        words = (one.field.json_schema_extra or {}).get("default")
        if not one.path.startswith("method.") or not words or one.part == "awp":
            continue
        for epsilon in (8 / 255, 16 / 255):
            section = parts.find("method", parts.METHODS, one.part)(name=one.part)
            section.resolve(epsilon)
            found = getattr(section, one.path.partition(".")[2])
            small, _, large = words.removesuffix(", at most 2").removesuffix(" where epsilon is above 8/255").partition("; ")
            told = (large or small) if epsilon > 8 / 255 else small
            formula = re.sub(r"([\d.]+) epsilon", r"\1 * epsilon", told).replace("×", "*").replace("^", "**")
            expected = eval(formula.replace(" and ", ","), {"epsilon": epsilon, "true": True, "false": False})
            assert found == pytest.approx(expected), f"{one.path} of {one.part}"
            seen += 1
    assert seen > 20


def test_every_model_that_has_a_name_is_described():
    text = (ROOT / "docs/configuration.md").read_text()
    (table,) = re.findall(r"^\| `model.name` \| network \|\n((?:\|.*\n)+)", text, re.M)
    described = {name for line in table.splitlines() for name in re.findall(r"`([^`]+)`", line.split("|")[1])}
    assert described >= parts.MODELS.keys()
