"""The types of a config's values, and the base of its sections."""

import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from fastrobust.config.numbers import parse_number


def key(meaning: str, default: Any = ..., in_words: str = "", *, values: str = "", **limits: Any) -> Any:
    """A key of a section: what it means; its default (... if there is none), and what that comes to where it is not the
    value itself; what may be given, where its type does not say it; and what else pydantic's Field takes. The tables of
    docs/configuration.md are made of it (docs/configuration.py)."""
    told = {"title": values} if values else {}
    return Field(default, description=meaning, json_schema_extra={"default": in_words}, **told, **limits)


def quoted(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _pixels(value: float, info: ValidationInfo) -> float:
    distance = info.field_name != "mean" and (info.context or {}).get("norm") == "l2"  # between images: often above 1
    if value > 1 and not distance:
        raise ValueError(f"{value:g} is larger than the pixel range [0, 1]; did you mean {value:g}/255?")
    return value


def folder_name(value: str) -> str:
    """The value, where it is a name for a folder; else ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", value):
        shown = value[:80].encode(errors="backslashreplace").decode()
        raise ValueError(f"'{shown}' is no name for a folder: up to 200 of A-Z a-z 0-9 . _ -, a letter or digit first")
    return value


def some(values: tuple) -> tuple:
    if not values:
        raise ValueError("at least one value is needed")
    return values


Number = Annotated[float, BeforeValidator(parse_number), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Pixels = Annotated[Number, Field(ge=0, title="pixels"), AfterValidator(_pixels)]  # a fraction of the pixel range: 8/255
FolderName = Annotated[str, AfterValidator(folder_name), Field(title="letters, digits, `.`, `_`, `-`; at most 200")]
Count = Annotated[int, Field(ge=1, le=10**9, strict=True, title="a count")]
Seed = Annotated[int, Field(ge=0, lt=2**31, strict=True, title="whole number from 0")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)
