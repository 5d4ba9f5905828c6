"""Every key of a config, those of all methods, optimisers and schedules of the tables included."""

import functools
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pydantic.fields import FieldInfo

from fastrobust.config import parts
from fastrobust.config.fields import Section
from fastrobust.config.schema import Config


@dataclass(frozen=True)
class Key:
    """path: `method.alpha`, or `phases.0.epochs` where there is a list. part: the `name` of the section that has it, such as
    `fgsm`. field: what pydantic knows of it. holds: whether its value is a section, with keys of its own."""

    path: str
    part: str | None
    field: FieldInfo
    holds: bool

    @property
    def meaning(self) -> str:
        return self.field.description or ""


@functools.cache
def every() -> tuple[Key, ...]:
    return tuple(of(Config))


def of(section: type[Section]) -> list[Key]:
    return list(_walk(section, "", None))


def chosen(data: dict[str, Any]) -> list[Key]:
    """The keys that this config may have; it may hold mistakes. Where a section names a part of ours they are the keys of
    that part, else those of all parts. A method within another, `method.of`, has the keys of methods."""
    sections = {section: value for section in parts.SECTIONS if isinstance(value := data.get(section), dict)}
    names = {section: value.get("name") for section, value in sections.items()}
    names = {section: name for section, name in names.items() if name in list(parts.SECTIONS[section])}
    known = [key for key in every() if key.part in (None, names.get(key.path.partition(".")[0], key.part))]
    if inner := sections.get("method", {}).get("of"):
        of_inner = (key for key in chosen({"method": inner}) if key.path.startswith("method."))
        known += [replace(key, path=f"method.of{key.path.removeprefix('method')}") for key in of_inner]
    return known


def _walk(section: type[Section], prefix: str, part: str | None) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        path, inner = prefix + name, _sections(field.annotation)
        table = parts.SECTIONS.get(path, {})
        yield Key(path, part, field, bool(inner or table))
        for kind in inner:
            yield from _walk(kind, f"{path}.0." if "tuple" in str(field.annotation) else f"{path}.", part)
        for word in table:
            yield from _walk(parts.find(path, table, word), f"{path}.", word)


def _sections(kind: Any) -> list[type[Section]]:
    """The sections that an annotation speaks of, but for those that a `name` chooses."""
    if isinstance(kind, type):
        return [kind] if issubclass(kind, Section) and kind is not Section else []
    return [found for part in typing.get_args(kind) for found in _sections(part)]
