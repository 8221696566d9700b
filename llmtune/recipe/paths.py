"""Paths that a user writes: any text is one, and what the system cannot look up is not there."""

import os
from pathlib import Path

from llmtune.recipe.located_yaml import Key, Located

_NAMED = ("eval", "launch")
"""Sections in which a bare word names something that llmtune ships, whatever file is beside the recipe."""


def expand_user(name: str) -> Path:
    """Return a path with `~` written out; a home folder that is not known stays as it is written."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def is_there(path: Path) -> bool:
    """Whether a file or folder exists; False for a name that no file system takes."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def folders(located: Located, key: Key) -> tuple[Path, ...]:
    """Return where a relative path at a key starts: the recipe's folder, then the working directory, which is Path().

    It is the other way round for a path that `--set` gave.
    """
    beside, here = located.path.parent, Path()
    is_override = located.places.get(key, "").startswith("--set ")
    return tuple(dict.fromkeys((here, beside) if is_override else (beside, here)))


def locate(value: str, key: Key, places: tuple[Path, ...]) -> str:
    """Return the absolute path of what is first there under `places`; the value as it is in the working directory."""
    if key[0] in _NAMED and "/" not in value and not value.endswith((".yaml", ".yml")):
        return value
    folder = next((folder for folder in places if is_there(folder / expand_user(value))), Path())
    beside = (folder / expand_user(value)).absolute()
    return value if beside == expand_user(value).absolute() else str(beside)


def describe_places(value: str, places: tuple[Path, ...]) -> str:
    """Name the absolute paths that a value was looked for at: "looked for /a/x and /b/x"."""
    paths = dict.fromkeys(os.path.abspath(folder / expand_user(value)) for folder in places)
    return f"looked for {' and '.join(paths)}"
