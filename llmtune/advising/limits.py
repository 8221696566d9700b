"""What a user may spend on a training: minutes and memory, as people write them."""

import math
import re
from dataclasses import dataclass

from llmtune.errors import RecipeError

_MINUTES = {"s": 1 / 60, "m": 1.0, "min": 1.0, "h": 60.0, "d": 1440.0}
_BYTES = {"mb": 10**6, "gb": 10**9, "tb": 10**12, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_WORD = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Limits:
    """A budget for a training; None where there is none."""

    minutes: float | None = None
    bytes: int | None = None

    @classmethod
    def of(cls, budget: str | None, memory: str | None) -> "Limits":
        """The limits that two options name; raises RecipeError for words that are none."""
        minutes = None if budget is None else _read("--budget", budget, _MINUTES, "m", "20m, 90s or 1.5h")
        room = None if memory is None else _read("--memory", memory, _BYTES, "gb", "8GB, 512MB or 7.5GiB")
        return cls(minutes, None if room is None else round(room))


def _read(option: str, text: str, units: dict[str, float] | dict[str, int], usual: str, examples: str) -> float:
    """The number in a word with a unit; raises RecipeError."""
    match = _WORD.fullmatch(text.strip())
    unit = (match[2] or usual).lower() if match else ""
    value = float(match[1]) * units.get(unit, 0) if match else 0.0
    if not 0 < value < math.inf:
        raise RecipeError(f"{option} {text}: is no {'time' if option == '--budget' else 'memory'}; try {examples}")
    return value
