"""Paths in a recipe: relative to its folder, then to the working directory; of `--set`, the other way round."""

import glob
import os
import re
from pathlib import Path, PurePath
from typing import Any

from llmtune.recipe.located_yaml import Key, Located

PATH_KEYS: tuple[Key, ...] = (
    ("model", "base"),
    ("model", "start"),
    ("model", "merge_into"),
    ("eval", "suite"),
    ("launch", "accelerate"),
)
"""The keys whose value may be a path, beside the sources of data."""
_NAMED = ("eval", "launch")
"""Sections in which a bare word names something that llmtune ships, whatever file is beside the recipe."""


def parse_key(dotted: str) -> Key:
    """Return a dotted key as the places of a recipe have it: data.train.0.source has the index 0."""
    return tuple(int(part) if part.isdecimal() else part for part in dotted.split("."))


def folders(located: Located, key: Key) -> tuple[Path, ...]:
    """Return the folders in which a relative path at a key is looked for, in order; Path() is the working directory."""
    beside, here = located.path.parent, Path()
    prefixes = (key[:size] for size in range(len(key), 0, -1))
    place = next((located.places[prefix] for prefix in prefixes if prefix in located.places), "")
    is_override = place.startswith("--set ")
    return tuple(dict.fromkeys((here, beside) if is_override else (beside, here)))


def locate(value: str, key: Key, places: tuple[Path, ...]) -> str:
    """Return the first path under one of `places` that exists, else the value as it is."""
    if key[0] in _NAMED and "/" not in value and not value.endswith((".yaml", ".yml")):
        return value
    test = source_exists if key[0] == "data" else exists
    folder = next((folder for folder in places if test(value, folder)), Path())
    return value if folder == Path() else _join(folder, value)


def exists(value: str, folder: Path = Path()) -> bool:
    """Whether a path, relative to a folder, names a file or folder; False for text that can be no path."""
    try:
        return (folder / Path(value).expanduser()).exists()
    except (OSError, RuntimeError, ValueError):  # too long, an unknown user, a NUL character
        return False


def source_exists(value: str, folder: Path = Path()) -> bool:
    """Whether a source of rows, relative to a folder, is a file, a folder, one with a split, or a pattern of files."""
    name, _, split = value.rpartition(":")
    if exists(value, folder) or (name and "/" not in split and exists(name, folder)):
        return True
    try:
        return glob.has_magic(value) and any(glob.iglob(_join(folder, value), recursive=True))
    except (OSError, RuntimeError, ValueError):
        return False


def absolute_source(value: str) -> str:
    """Return a source of rows with an absolute path; the name of a Hub data set as it is."""
    return _join(Path().absolute(), value) if source_exists(value) else value


def _join(folder: Path, value: str) -> str:
    """Put a folder before a path, or before a pattern, in which the folder's own characters stay as they are."""
    path = Path(value).expanduser()
    is_pattern = glob.has_magic(value) and not exists(value, folder)
    return str(Path(glob.escape(str(folder))) / path if is_pattern else folder / path)


def describe_places(value: str, places: tuple[Path, ...]) -> str:
    """Name the absolute paths that a value was looked for at: "looked for /a/x and /b/x"."""
    paths = dict.fromkeys(os.path.abspath(folder / os.path.expanduser(value)) for folder in places)
    return f"looked for {' and '.join(paths)}"


def strip_paths(value: object) -> Any:
    """Replace every text that is an absolute path by its last part, in lists and mappings too."""
    if isinstance(value, dict):
        return {key: strip_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(strip_paths(item) for item in value)
    if isinstance(value, str) and re.match(r"[/~]|[A-Za-z]:[\\/]|\\\\", value):
        return PurePath(value.replace("\\", "/")).name
    return value
