"""README.md, docs/ and benchmarks/RECORDS.md name commands, files, links and keys that exist, and the defaults that hold."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
import typing
from pathlib import Path

import pytest
import torch
from pydantic_core import PydanticUndefined

from fastrobust.__main__ import OPTIONS, parse
from fastrobust.config import parts, reading
from fastrobust.config.fields import Section
from fastrobust.config.numbers import parse_number
from fastrobust.config.schema import Config

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


def rows() -> list[tuple[str, list[str]]]:
    """(key, the cells of its row) in the tables of docs/configuration.md whose first column holds keys."""
    found = []
    for line in (ROOT / "docs/configuration.md").read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        key = re.fullmatch(r"`([\w.]+)`", cells[0]) if cells else None
        if key and len(cells) > 2 and key[1].split(".")[0] in Config.model_fields:
            found.append((key[1].replace(".N.", ".0."), cells))
    return found


def keys_with_values() -> set[str]:
    """Every key of the schema but those that hold other keys."""
    known = reading._all_keys()
    return {key for key in known if not any(other.startswith(f"{key}.") for other in known)}


def test_every_key_of_the_schema_is_in_the_documentation():
    assert keys_with_values() <= {key for key, _ in rows()}


def test_every_key_in_the_documentation_is_in_the_schema():
    assert {key for key, _ in rows()} <= keys_with_values()


def fields() -> list[tuple[str, str | None, typing.Any]]:
    """(key, the part that it belongs to or None, pydantic's field) of every key with a value."""
    tables = {"method": parts.METHODS, "optimizer": parts.OPTIMIZERS, "schedule": parts.SCHEDULES}

    def walk(section: type[Section], prefix: str, part: str | None) -> list:
        found = []
        for name, field in section.model_fields.items():
            inner = nested(field.annotation)
            if inner is None:
                found.append((prefix + name, part, field))
            else:
                found += walk(inner, f"{prefix}{name}.{'0.' if 'tuple' in str(field.annotation) else ''}", part)
        return found

    everything = []
    for key, part, field in walk(Config, "", None):
        table = tables.get(key)
        if table is None:
            everything.append((key, part, field))
        for name in table or ():
            everything += walk(parts.find(f"{key}.name", table, name), f"{key}.", name)
    return everything


def nested(annotation: typing.Any) -> type[Section] | None:
    """The section that an annotation speaks of; None for the base of a named part, and for values."""
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, Section) and annotation is not Section else None
    return next((found for part in typing.get_args(annotation) if (found := nested(part))), None)


def test_defaults_and_words_in_the_documentation_are_those_of_the_schema():
    table = rows()
    compared = 0
    for key, part, field in fields():
        if key.endswith(".name") and part:
            continue  # each part's own name
        of_key = [cells for found, cells in table if found == key]
        if part is not None:  # key | of | values | default | meaning
            of_key = [cells for cells in of_key if cells[1] == "all" or f"`{part}`" in cells[1]]
        assert len(of_key) == 1, f"{key} of {part or 'the config'} has {len(of_key)} rows"
        *_, values, default, _ = of_key[0]
        words = [word for kind in literals(field.annotation) for word in typing.get_args(kind)]
        words = [str(word).lower() if isinstance(word, bool) else word for word in words]
        assert {f"`{word}`" for word in words} <= set(re.findall(r"`[^`]+`", values)), key
        if field.default is PydanticUndefined:
            expected = "the file's name without `.yaml`" if key == "name" else "needed"
            assert expected in default, f"{key} of {part}: {default}"
        elif field.default is not None:
            (told,) = re.findall(r"`([^`]+)`", default)
            assert value_of(told) == as_list(field.default), f"{key} of {part}: {told}"
            compared += 1
        else:
            assert default not in ("needed", ""), key  # filled in later, from other keys
    assert compared > 25


def literals(annotation: typing.Any) -> list:
    """The Literal types within an annotation."""
    if typing.get_origin(annotation) is typing.Literal:
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in literals(part)]


def as_list(value: typing.Any) -> typing.Any:
    return list(value) if isinstance(value, tuple) else value


def value_of(text: str) -> typing.Any:
    value = reading.read_yaml(f"v: {text}", "the documentation")["v"]
    return parse_number(value) if isinstance(value, str) and re.match(r"[\d.]", value) else value
