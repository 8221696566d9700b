"""Numbers for people, formatted in one place: durations, counts, bytes, learning rates, other values."""

import math


def duration(seconds: float) -> str:
    """Format seconds as 0:07, 3:21 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def count(value: float) -> str:
    """Format a count: every digit below a million (12,345), above it four digits and a suffix (134.5M, 8.03B)."""
    if value < 999_950:
        return f"{value:,.0f}"
    limit, suffix = (1e9, "B") if value >= 999_950_000 else (1e6, "M")
    return f"{value / limit:.4g}{suffix}"


def rate(value: float) -> str:
    """Format a learning rate in two digits, as 1e-3 or 2.5e-4; 0 for a frozen layer."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def size(number: float) -> str:
    """Format a number of bytes in powers of 1000: 12 B, 1.5 kB, 269 MB, 2.5 TB."""
    for unit in ("B", "kB", "MB", "GB"):
        if round(number) < 1000:
            return f"{number:.0f} {unit}" if unit == "B" or number >= 99.95 else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def number(value: object) -> str:
    """Format a value of a JSON file: floats in four digits, integers with commas, yes, no or none, text as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
