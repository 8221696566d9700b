"""What a search draws from: for each key of a recipe a range of numbers, or a list of values."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Value = str | int | float | bool | None
Values = Mapping[str, Value]
"""A value for each key of a space; texts are YAML, as after --set."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones alone, or drawn by their logarithm."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def ends(self) -> tuple[Value, ...]:
        """The values that are tried before anything trains."""
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)

    def holds(self, value: object) -> bool:
        """Whether a value is in the range."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.low <= float(str(value)) <= self.high

    def distribution(self) -> "BaseDistribution":
        """What Optuna draws from."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def __str__(self) -> str:
        low, high = (text_of(end) for end in self.ends())
        return f"{low}..{high}{':log' * self.log}"


@dataclass(frozen=True)
class Choice:
    """Values one of which is taken: numbers, or words of YAML."""

    values: tuple[Value, ...]

    def ends(self) -> tuple[Value, ...]:
        """The values that are tried before anything trains."""
        return self.values

    def holds(self, value: object) -> bool:
        """Whether a value is one of these."""
        return value in self.values

    def distribution(self) -> "BaseDistribution":
        """What Optuna draws from."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)

    def __str__(self) -> str:
        return ",".join(text_of(value) for value in self.values)


Space = Mapping[str, Range | Choice]
"""What is drawn for each dotted key."""


def combinations(space: Space, limit: int) -> list[dict[str, Value]] | None:
    """Every combination of the values of a space; None where it has a range, or more than `limit` of them."""
    choices = [one for one in space.values() if isinstance(one, Choice)]
    if len(choices) < len(space) or math.prod(len(one.values) for one in choices) > limit:
        return None
    return [dict(zip(space, values, strict=True)) for values in product(*(one.values for one in choices))]


def overrides(values: Values) -> list[str]:
    """The `a.b=c` overrides that give a recipe these values."""
    return [f"{key}={text_of(value)}" for key, value in values.items()]


def text_of(value: Value) -> str:
    """A value as YAML reads it back, every digit of a number kept: 1.0e-05, and not 1e-05, which is a text there."""
    if isinstance(value, str):
        return value
    text = json.dumps(value)
    mantissa, mark, exponent = text.partition("e")
    return f"{mantissa}.0e{exponent}" if mark and "." not in mantissa and isinstance(value, float) else text


def shown(values: Values) -> str:
    """Values for people, numbers in four digits: method.lr 0.0003162, method.adapter.rank 8."""
    texts = ((key, f"{value:.4g}" if isinstance(value, float) else text_of(value)) for key, value in values.items())
    return ", ".join(f"{key} {text}" for key, text in texts)
