"""What `data.train`, `eval` and `test` name: a file or a Hub data set; its records, or why there are none."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtune.data.sources.cursor import Cursor, explain
from llmtune.data.sources.files import READERS
from llmtune.errors import MachineError, RecipeError, first_line, nearest
from llmtune.files import user_path
from llmtune.recipe.paths import describe_places

_FILE_ENDING = re.compile(r"\.[A-Za-z]{2,8}")
_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+?)(:(?P<split>[\w.-]+))?")


def records(at: Cursor, default_split: str) -> Iterator[Any]:
    """Read the records of the cursor's source, and keep the cursor at the place of the one that was given last.

    Raises RecipeError for a source that cannot be read, MachineError for a Hub data set that cannot be reached.
    """
    reason = problem(at.source)
    if reason:
        raise RecipeError(reason)
    kind = _kind(at.source)
    yield from _hub(at, default_split) if kind is None else READERS[kind](user_path(at.source), at)


def problem(source: str, folders: tuple[Path, ...] = (Path(),)) -> str | None:
    """Say why a source cannot be read, None where it may be; `folders` are where the name was looked for."""
    try:
        return _problem(source, folders)
    except RecipeError as error:  # a home folder that is not known
        return str(error)
    except OSError as error:  # a name that is too long, a closed folder
        return f"{source}: {explain(error)}"


def is_file(source: str) -> bool:
    """Whether a source is a file, not a Hub data set."""
    return user_path(source).is_file()


def _problem(source: str, folders: tuple[Path, ...]) -> str | None:
    if any("\ud800" <= char <= "\udfff" for char in source):
        return f"{source}: the name is not UTF-8; rename the file"
    path = user_path(source)
    if path.is_dir():
        return f"{source} is a folder; name the file in it ({_list_files(path)})"
    if path.is_file():
        return None if _kind(source) else f"{source}: {_unreadable(path)}"
    if path.exists():
        return f"{source}: is not a regular file; save its rows as one"
    if path.is_symlink():
        return f"{source}: is a link to {os.readlink(path)}, which does not exist"
    if _HUB.fullmatch(source) and not _FILE_ENDING.fullmatch(path.suffix) and not path.parent.is_dir():
        return None
    return _missing(source, [(folder / path).parent.absolute() for folder in folders], folders)


def _unreadable(path: Path) -> str:
    """Say what to do with a file of a kind that no reader takes."""
    if path.suffix.lower() == ".json":
        command = f"jq -c '.[]' {path.name} > {path.stem}.jsonl"
        return f"one JSON list is not read; write one row a line, in a .jsonl file, as {command} does"
    return f"unknown kind of file; try {', '.join(READERS)}"


def _missing(source: str, parents: list[Path], folders: tuple[Path, ...]) -> str:
    """Say where a file was looked for, and the nearest name that there is."""
    names = [file.name for folder in parents if folder.is_dir() for file in folder.iterdir()]
    there = any(folder.is_dir() for folder in parents)
    hint = nearest(user_path(source).name, names) if there else f"; there is no folder {parents[0]}"
    return f"no file {source} ({describe_places(source, folders)}){hint}"


def _kind(source: str) -> str | None:
    return next((ending for ending in READERS if source.lower().endswith(ending)), None)


def _list_files(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir() if _kind(file.name))
    return ", ".join(names[:5]) if names else f"it has none that ends in {', '.join(READERS)}"


def _hub(at: Cursor, default_split: str) -> Iterator[Any]:
    """Read a Hub data set as plain data; raises RecipeError for one that contains code."""
    import datasets

    match = _HUB.fullmatch(at.source)
    assert match is not None
    name, split = match["name"], match["split"] or default_split
    try:
        rows = datasets.load_dataset(name, split=split)
    except RuntimeError as error:
        raise RecipeError(f"{at.source}: data sets that run code are not allowed: {first_line(error)}") from error
    except ValueError as error:
        raise RecipeError(f"{at.source}: {first_line(error)}") from error
    except Exception as error:
        reason = f"is not a file, and the Hub data set cannot be loaded: {_hub_reason(error)}"
        raise MachineError(f"{at.source}: {reason}") from error
    for number, record in enumerate(rows, 1):
        at.line = number
        yield record


def _hub_reason(error: Exception) -> str:
    return "HF_HUB_OFFLINE is set and the data set is not in the cache" if _offline() else first_line(error)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
