"""Values out of JSON files that may be null, absent, not finite or of another version."""

from datetime import datetime
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.files import read_json

JSON = dict[str, Any]
"""A JSON object."""

_SMALLEST, _LARGEST = 1e-200, 1e200  # what lies beyond overflows in the arithmetic of a chart


def read_object(file: Path) -> JSON:
    """Read the JSON object in a file; empty for a file that is absent or damaged."""
    try:
        return mapping(read_json(file))
    except LlmtuneError:
        return {}


def number(value: object) -> float | None:
    """Return a finite number, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST < value < _LARGEST:
        return None
    return value if abs(value) > _SMALLEST else 0.0


def whole(value: object) -> int | None:
    """Return a whole number that is not negative, None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63 else None


def text(value: object) -> str | None:
    """Return a text that is not empty, None for anything else."""
    return value if isinstance(value, str) and value else None


def mapping(value: object) -> JSON:
    """Return a JSON object, an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def mappings(value: object) -> list[JSON]:
    """Return the objects in a JSON list; what is none of them becomes an empty one."""
    return [mapping(item) for item in value] if isinstance(value, list) else []


def texts(value: object) -> list[str]:
    """Return the texts in a JSON list."""
    return [item for item in value if text(item)] if isinstance(value, list) else []


def moment(value: object) -> str | None:
    """Format an ISO time as 2026-11-26 18:00 UTC; None for what is no time."""
    try:
        return f"{datetime.fromisoformat(str(value)):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return None
