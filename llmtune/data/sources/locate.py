"""What `data.train`, `eval` and `test` name: files or a Hub data set; their records, or why there are none."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtune.data.sources.columnar import is_saved, read_saved
from llmtune.data.sources.cursor import Cursor, explain
from llmtune.data.sources.files import ENDINGS, reader_of
from llmtune.data.sources.folders import files_of, split_name
from llmtune.data.sources.hub import HubName, read_hub
from llmtune.errors import RecipeError, nearest
from llmtune.files import user_path
from llmtune.recipe.paths import describe_places

_FILE_ENDING = re.compile(r"\.[A-Za-z]{2,8}")


def records(at: Cursor, default_split: str) -> Iterator[Any]:
    """Read the records of the cursor's source, and keep the cursor at the place of the one that was given last.

    Raises RecipeError for a source that cannot be read, MachineError for a Hub data set that cannot be reached.
    """
    reason = problem(at.source)
    if reason:
        raise RecipeError(reason)
    path = user_path(at.source)
    files = files_of(at.source, default_split)
    if files is None:
        yield from _read(path, at) if path.exists() else read_hub(at, default_split)
        return
    for file in files:
        if is_saved(file):
            yield from read_saved(file, at)
        else:
            at.enter(str(file))
            yield from _read(file, at)


def source_files(source: str, default_split: str = "train") -> list[Path]:
    """The files that a source's rows are in, in the order in which they are read; none of a Hub data set."""
    try:
        files = files_of(source, default_split)
        if files is None:
            return [path] if (path := user_path(source)).is_file() else []
    except (RecipeError, OSError):
        return []
    saved = [file for file in files if is_saved(file)]
    return sorted(path for folder in saved for path in folder.iterdir() if path.is_file()) if saved else files


def problem(source: str, folders: tuple[Path, ...] = (Path(),), default_split: str | None = None) -> str | None:
    """Say why a source cannot be read, None where it may be; `folders` are where the name was looked for.

    With a `default_split`, a folder must have it where the source names none.
    """
    try:
        return _problem(source, folders, default_split)
    except RecipeError as error:  # a home folder that is not known, a folder without rows
        return str(error)
    except OSError as error:  # a name that is too long, a closed folder
        return f"{source}: {explain(error)}"


def is_file(source: str) -> bool:
    """Whether a source is a file, not a folder, a pattern or a Hub data set."""
    return user_path(source).is_file()


def _read(path: Path, at: Cursor) -> Iterator[Any]:
    reader = reader_of(path.name)
    assert reader is not None
    return reader(path, at)


def _problem(source: str, folders: tuple[Path, ...], default_split: str | None) -> str | None:
    if any("\ud800" <= char <= "\udfff" for char in source):
        return f"{source}: the name is not UTF-8; rename the file"
    path = user_path(source)
    if path.is_file():
        return None if reader_of(path.name) else f"{source}: unknown kind of file; try {ENDINGS}"
    if path.is_dir() or split_name(source)[1]:
        if default_split:
            files_of(source, default_split)
        return None
    if path.exists():
        return f"{source}: is not a regular file; save its rows as one"
    if path.is_symlink():
        return f"{source}: is a link to {os.readlink(path)}, which does not exist"
    if "*" in source or "?" in source or files_of(source, ""):
        return None if files_of(source, "") else f"no file matches {source} ({describe_places(source, folders)})"
    name = HubName.parse(source)
    if name and not _FILE_ENDING.fullmatch(Path(name.name).suffix) and not user_path(name.name).parent.is_dir():
        return None
    return _missing(source, [(folder / path).parent.absolute() for folder in folders], folders)


def _missing(source: str, parents: list[Path], folders: tuple[Path, ...]) -> str:
    """Say where a file was looked for, and the nearest name that there is."""
    names = [file.name for folder in parents if folder.is_dir() for file in folder.iterdir()]
    there = any(folder.is_dir() for folder in parents)
    hint = nearest(user_path(source).name, names) if there else f"; there is no folder {parents[0]}"
    return f"no file {source} ({describe_places(source, folders)}){hint}"
