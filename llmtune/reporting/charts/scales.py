"""Axes as pure functions: ranges and round ticks on linear and logarithmic scales, and pixels of values."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

Range = tuple[float, float]

DECADES_OF_LOG, MOST_DECADES, FACTOR_OF_LOG = 2, 6, 20


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` over pixels from `start` to `end`, by their logarithm where `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value; on a logarithmic scale what is below its low end lies there."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log10(max(value, low)), math.log10(low), math.log10(high)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self, count: int) -> list[float]:
        """Return about `count` round values, or the powers of ten of a logarithmic scale."""
        return decades(self.low, self.high) if self.log else ticks(self.low, self.high, count)


def spans_decades(values: Iterable[float]) -> bool:
    """Whether the positive ones of these values lie two orders of magnitude apart or more."""
    positive = [value for value in values if value > 0]
    return bool(positive) and max(positive) >= 10**DECADES_OF_LOG * min(positive)


def needs_log(values: Iterable[float]) -> bool:
    """Whether values of which the low ones matter, such as the losses of a search, need a logarithmic scale.

    A rate that is too high drives its loss up, and the others would lie on one line.
    """
    known = list(values)
    return bool(known) and min(known) > 0 and max(known) > FACTOR_OF_LOG * min(known)


def log_floor(values: Iterable[float]) -> float:
    """Return the least positive value, at most six orders of magnitude below the largest."""
    positive = [value for value in values if value > 0]
    return max(min(positive), max(positive) / 10**MOST_DECADES)


def linear_range(values: list[float]) -> Range:
    """Return a range around the values, from 0 on where they come near it."""
    low, high = min(values), max(values)
    low = 0.0 if 0 <= low < 0.5 * high else low
    step = (high - low or abs(high)) * 0.05 or 1.0
    return (low if low == 0 else low - step, high + step)


def log_range(floor: float, values: list[float]) -> Range:
    """Return a range from just below `floor` to just above the largest value."""
    high = max([*values, floor])
    return (floor / 1.1, high * 1.1)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round values (1, 2 or 5 times a power of ten apart) from low to high."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """Return powers of ten from high to low, at most seven."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    every = max(1, math.ceil((last - first + 1) / 7))
    return [10.0**power for power in range(last, first - 1, -every)]
