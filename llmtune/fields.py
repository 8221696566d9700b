"""Building blocks of recipe sections: the strict base class and the types of numbers and names."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Closed(BaseModel):
    """A recipe section that rejects unknown keys, never converts values, and cannot change after validation."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )


def listed(value: object) -> object:
    """Convert a YAML list to the tuple that a frozen section holds; return anything else unchanged."""
    return tuple(value) if isinstance(value, list) else value


def _compiles(pattern: str) -> str:
    """Return a pattern of layer names; raises ValueError where it is no regular expression."""
    try:
        re.compile(pattern)
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        reason = f"{pattern[:40]!r} is no regular expression: {error}"
        raise ValueError(f"{reason}; write a layer's name such as q_proj, or an expression for its end") from error
    return pattern


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Width = Annotated[int, Field(ge=1, le=65_536)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Reach = Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)] | Literal["all"]
Decay = Annotated[float, Field(gt=0, le=1.5)]
Names = Annotated[tuple[str, ...], BeforeValidator(listed), Field(min_length=1)]
Distances = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(listed), Field(min_length=1)]
Pattern = Annotated[str, AfterValidator(_compiles)]
