"""Numbers for people: durations, counts, bytes and rates, formatted in one place."""

import math
from typing import Any


def duration(seconds: float) -> str:
    """Seconds as 0:07, 3:21 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rate(value: float) -> str:
    """A learning rate as 1e-3 or 2.5e-4, 0 where frozen."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def size(count: float) -> str:
    """A number of bytes as 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def count(value: float) -> str:
    """A number of things as 12,345, 134.5M or 8.03B."""
    for limit, unit in ((1e9, "B"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.4g}{unit}"
    return f"{value:,.0f}"


def number(value: Any) -> str:
    """A value of a measurement file: numbers short, everything else as text."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
