"""Every key of a config, those of all methods, optimisers and schedules of the tables included."""

import functools
import typing
from collections.abc import Iterator
from dataclasses import dataclass
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
    return tuple(_walk(Config, "", None))


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
