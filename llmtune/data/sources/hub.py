"""Reads data sets of the Hub through `datasets`, by configuration and split; none that contains code."""

import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from llmtune.data.sources.columnar import plain_records
from llmtune.data.sources.cursor import Cursor
from llmtune.errors import MachineError, RecipeError, first_line, nearest

_PART = r"[^:/\\*?\[\]\s]+"
_HUB = re.compile(rf"(?P<name>[\w.-]+/[\w.-]+)(:(?P<first>{_PART}))?(:(?P<second>{_PART}))?")
_LISTED = re.compile(r"(?:available[^\[]*|should be one of )\[([^\]]*)\]", re.IGNORECASE)
_CONFIGURATION = re.compile(r"config", re.IGNORECASE)


class HubName(NamedTuple):
    """A Hub data set as a recipe names it."""

    name: str
    configuration: str | None
    split: str | None

    @classmethod
    def parse(cls, source: str) -> "HubName | None":
        """Take a source apart; a single word after the name may be a split or, as turns out later, a configuration."""
        match = _HUB.fullmatch(source)
        if match is None:
            return None
        first, second = match["first"], match["second"]
        return cls(match["name"], first if second else None, second or first)


def read_hub(at: Cursor, default_split: str) -> Iterator[Any]:
    """Read a Hub data set as plain data; raises RecipeError for a configuration or a split that it does not have."""
    named = HubName.parse(at.source)
    assert named is not None
    yield from plain_records(_load(at.source, named, default_split), at)


def _load(source: str, named: HubName, default_split: str) -> Any:
    import datasets

    configurations = () if named.configuration is None else (named.configuration,)
    try:
        return datasets.load_dataset(named.name, *configurations, split=named.split or default_split)
    except RuntimeError as error:
        raise RecipeError(f"{source}: data sets that run code are not allowed: {first_line(error)}") from error
    except ValueError as error:
        if named.configuration is None and named.split in _configurations(named.name, error):
            return _load(source, HubName(named.name, named.split, None), default_split)
        raise RecipeError(f"{source}: {_explain(named, default_split, error)}") from error
    except Exception as error:
        reason = f"is not a file, and the Hub data set cannot be loaded: {_hub_reason(error)}"
        raise MachineError(f"{source}: {reason}") from error


def _explain(named: HubName, default_split: str, error: ValueError) -> str:
    """Say which configuration or split is not there, and those that are."""
    there, name = _listed(error), named.name
    if not there:
        return first_line(error)
    if not _CONFIGURATION.search(first_line(error)):
        split = named.split or default_split
        return f"has no split {split!r}; it has {', '.join(there)}{nearest(split, there)}"
    if named.configuration is None:
        example = f"{name}:{there[0]}:{named.split or default_split}"
        return f"has the configurations {', '.join(there)}; name one of them, as {example}"
    close = nearest(named.configuration, there)
    return f"has no configuration {named.configuration!r}; it has {', '.join(there)}{close}"


def _configurations(name: str, error: ValueError) -> list[str]:
    """The configurations of a data set: those that an error lists, else those that the Hub, or the cache, knows."""
    if _CONFIGURATION.search(first_line(error)):
        return _listed(error)
    import datasets

    try:
        return list(datasets.get_dataset_config_names(name))
    except Exception:  # the error that led here says more
        return []


def _listed(error: ValueError) -> list[str]:
    """The names that an error of `datasets` lists."""
    match = _LISTED.search(str(error))
    return [name.strip().strip("'\"") for name in match[1].split(",")] if match and match[1] else []


def _hub_reason(error: Exception) -> str:
    return "HF_HUB_OFFLINE is set and the data set is not in the cache" if _offline() else first_line(error)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
