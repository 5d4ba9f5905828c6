# python docs/configuration.py
"""Writes the tables of docs/configuration.md: the key, values, default and meaning of every key of a config, as
fastrobust/config/schema.py, sections.py and the methods, optimisers and schedules have them.

A table stands between `<!-- keys: data -->`, which names sections or keys, and `<!-- end -->`. What is between the tables is
written by hand.
"""

import re
import typing
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from fastrobust.config import keys, parts
from fastrobust.config.fields import quoted

PAGE = Path(__file__).with_suffix(".md")
TABLE = re.compile(r"(<!-- keys: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
LIMITS = {  # the names of a number's limits in pydantic -> how they are told
    ("ge",): "{ge:g} or more",
    ("gt",): "above {gt:g}",
    ("ge", "le"): "{ge:g} to {le:g}",
    ("ge", "lt"): "{ge:g} to below {lt:g}",
    ("gt", "lt"): "between {gt:g} and {lt:g}",
    ("gt", "le"): "above {gt:g}, up to {le:g}",
}


def values(kind: Any, title: str | None, metadata: typing.Iterable) -> str:
    """What may be given for a type, in words. `title` and `metadata` are what pydantic's Field has of it."""
    arguments = [part for part in typing.get_args(kind) if part is not type(None)]
    limits = {
        name: limit for m in metadata for name in ("ge", "gt", "le", "lt") if (limit := getattr(m, name, None)) is not None
    }
    if title:
        return title
    if limits:
        return LIMITS[tuple(sorted(limits, key=lambda name: (name[0] != "g", name)))].format(**limits)
    if kind is bool or typing.get_origin(kind) is typing.Literal:
        words = (True, False) if kind is bool else arguments
        return quoted(str(word).lower() if isinstance(word, bool) else word for word in words)
    if typing.get_origin(kind) is typing.Annotated:
        fields = [m for m in kind.__metadata__ if isinstance(m, FieldInfo)]
        title = next((field.title for field in reversed(fields) if field.title), None)
        return values(kind.__origin__, title, [m for field in fields for m in field.metadata])
    if typing.get_origin(kind) is tuple:
        return f"list of {values(arguments[0], None, ())}"
    if len(arguments) == 1:  # X | None
        return values(arguments[0], None, ())
    raise SystemExit(f"give `values` to the key whose type is {kind}")


def default(field: FieldInfo) -> str:
    if words := (field.json_schema_extra or {}).get("default"):
        return words
    if field.is_required():
        return "needed"
    return f"`{value(field.default)}`"


def value(given: Any) -> str:
    """As YAML has it."""
    if isinstance(given, bool):
        return str(given).lower()
    if isinstance(given, tuple):
        return f"[{', '.join(map(value, given))}]"
    return f"{given:g}" if isinstance(given, float) else str(given)


def row(key: keys.Key) -> tuple[str, str, str, str]:
    """(key, values, default, meaning)"""
    if table := parts.SECTIONS.get(key.path):
        return f"{key.path}.name", quoted((*table, "package.module:Class")), "needed", key.meaning
    field = key.field
    if not key.meaning:
        raise SystemExit(f"{key.path} has no meaning: give it one with fastrobust.config.fields.key")
    return key.path.replace(".0.", ".N."), values(field.annotation, field.title, field.metadata), default(field), key.meaning


def table(wanted: list[str]) -> str:
    """The table of the keys that are named, and of those in the sections that are named."""
    below = [key for name in wanted for key in keys.every() if f"{key.path}.".startswith(f"{name}.")]
    shown = [key for key in below if not key.holds or key.path in parts.SECTIONS]
    rows: dict[tuple[str, ...], list[str]] = {}
    for key in shown:
        if not (key.part and key.path.endswith(".name")):
            rows.setdefault(row(key), []).append(key.part or "all")
    named = {key.path.partition(".")[0] for key in shown} & parts.SECTIONS.keys()
    order = [key for key, *_ in rows]
    lines = [["key", *(["of"] if named else []), "values", "default", "meaning"]]
    lines.append(["---"] * len(lines[0]))
    for cells, of in sorted(rows.items(), key=lambda found: order.index(found[0][0])):
        everywhere = "all" in of or any(of == list(parts.SECTIONS[section]) for section in named)
        whose = ["all" if everywhere else quoted(of)] if named else []
        lines.append([f"`{cells[0]}`", *whose, *cells[1:]])
    return (
        "".join(f"| {' | '.join(line)} |\n" for line in lines)
        .replace("| --- | --- |", "|---|---|")
        .replace(" --- |", "---|")
    )


def page(text: str) -> str:
    """The page with its tables written anew. Every key of the schema is in one of them."""
    named = [name for _, names, _ in TABLE.findall(text) for name in names.split()]
    for key in keys.every():
        if not key.holds and sum(f"{key.path}.".startswith(f"{name}.") for name in named) != 1:
            raise SystemExit(f"{PAGE.name} must have the key {key.path} in one table: name it in a line `<!-- keys: … -->`")
    return TABLE.sub(lambda found: found[1] + table(found[2].split()) + found[3], text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
