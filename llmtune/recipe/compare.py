"""Two recipes side by side: whether they are the same run, and in which key they differ."""

from collections.abc import Iterator, Mapping
from typing import Any

from llmtune.recipe.sections import Recipe, values

DEFINING = ("model", "data", "method", "train")
"""The sections of a recipe that make a run what it is; the others may change, and their steps are then done again."""


def difference(old: Recipe, new: Recipe) -> str:
    """Name the first key in which two recipes are different runs, with both values; "" for the same run."""
    before, after = (dict(flatten(_defining(one))) for one in (old, new))
    return next(differences(before, after), "")


def differences(old: Mapping[str, object], new: Mapping[str, object]) -> Iterator[str]:
    """Yield the keys of two flat mappings that differ, those of the new one first, in words."""
    for key in dict.fromkeys((*new, *old)):
        if old.get(key) != new.get(key):
            yield f"{key} is {_shown(old.get(key))} there and {_shown(new.get(key))} here"


def _defining(settings: Recipe) -> dict[str, Any]:
    return {name: value for name, value in values(settings).items() if name in DEFINING}


def _shown(value: object) -> object:
    return "not set" if value is None else value


def flatten(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Yield dotted keys and values of nested mappings."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from flatten(inner, f"{key}.{name}" if key else name)
    else:
        yield key, value
