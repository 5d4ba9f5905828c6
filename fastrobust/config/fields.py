"""The types of a config's values, and the base of its sections."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from fastrobust.config.numbers import parse_number


def _pixels(value: float, info: ValidationInfo) -> float:
    distance = info.field_name != "mean" and (info.context or {}).get("norm") == "l2"  # between images: often above 1
    if value > 1 and not distance:
        raise ValueError(f"{value:g} is larger than the pixel range [0, 1]; did you mean {value:g}/255?")
    return value


def _folder_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", value):
        raise ValueError(f"'{value[:80]}' is no name for a folder: up to 200 of A-Z a-z 0-9 . _ -, a letter or digit first")
    return value


def some(values: tuple) -> tuple:
    if not values:
        raise ValueError("at least one value is needed")
    return values


Number = Annotated[float, BeforeValidator(parse_number), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Pixels = Annotated[Number, Field(ge=0), AfterValidator(_pixels)]  # a fraction of the pixel range: 8/255
FolderName = Annotated[str, AfterValidator(_folder_name)]
Count = Annotated[int, Field(ge=1, le=10**9, strict=True)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)
