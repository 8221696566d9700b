"""Reads raw records of a .jsonl, .csv or .parquet file or of a Hub data set, each with its place."""

import csv
import gzip
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmtune.errors import MachineError, RecipeError, nearest
from llmtune.files import user_path

Record = tuple[str, Any]
"""The place of a record ("train.jsonl:12") and its value."""

_FILE_ENDING = re.compile(r"\.[A-Za-z]{2,8}")
_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+?)(:(?P<split>[\w.-]+))?")


def records(source: str, default_split: str) -> Iterator[Record]:
    """Read the records of a file or Hub data set; raises RecipeError, or MachineError where the set is unreachable."""
    reason = problem(source)
    if reason:
        raise RecipeError(reason)
    kind = _kind(source)
    if kind is None:
        yield from _hub(source, default_split)
        return
    try:
        yield from _READERS[kind](source)
    except (OSError, EOFError) as error:
        raise RecipeError(f"{source}: cannot be read: {_first_line(error)}") from error


def problem(source: str) -> str | None:
    """Say why a source cannot be read (no such file, a folder, an unknown kind of file), None where it may be."""
    path = _path(source)
    if path.is_dir():
        return f"{source} is a folder; name the file in it ({_list_files(path)})"
    if path.is_file():
        known = _kind(source) is not None
        return None if known else f"{source}: unknown kind of file; try {', '.join(_READERS)}"
    if _HUB.fullmatch(source) and not _FILE_ENDING.fullmatch(path.suffix) and not path.parent.is_dir():
        return None
    folder = path.absolute().parent
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    hint = nearest(path.name, names) if folder.is_dir() else f"; there is no folder {folder}"
    return f"no file {source} (looked for {path.absolute()}){hint}"


def is_file(source: str) -> bool:
    """Whether a source is a file, not a Hub data set."""
    return _path(source).is_file()


def _path(source: str) -> Path:
    return user_path(source)


def _kind(source: str) -> str | None:
    return next((suffix for suffix in _READERS if source.lower().endswith(suffix)), None)


def _list_files(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir() if _kind(file.name))
    return ", ".join(names[:5]) if names else f"it has none that ends in {', '.join(_READERS)}"


def _json_lines(source: str) -> Iterator[Record]:
    opener = gzip.open if source.lower().endswith(".gz") else open
    with opener(_path(source), "rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{source}:{number}"
            line = _text(raw.removeprefix(b"\xef\xbb\xbf"), where)
            if line.strip():
                yield where, _json(line, where)


def _text(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{where}: not UTF-8 text (byte {error.start + 1} of the line); save the file as UTF-8"
        ) from error


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        hint = "; write a JSON list as one object per line" if line.strip() in ("[", "{") else ""
        raise RecipeError(f"{where}: not JSON: {detail}{hint}") from error


def _csv(source: str) -> Iterator[Record]:
    """Read a CSV file with a header; the place of a record is the line on which it starts."""
    with _path(source).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header: list[str] | None = None
        while True:
            where = f"{source}:{reader.line_num + 1}"
            cells = _next_cells(reader, where)
            if cells is None:
                return
            if header is None:
                header = cells
            elif cells and len(cells) != len(header):
                raise RecipeError(f"{where}: {len(cells)} cells where the header names {len(header)} columns")
            elif cells:
                yield where, dict(zip(header, cells, strict=True))


def _next_cells(reader: Any, where: str) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise RecipeError(f"{where}: not CSV: {error}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where}: not UTF-8 text; save the file as UTF-8") from error


def _parquet(source: str) -> Iterator[Record]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.read_table(_path(source))
    except pyarrow.ArrowException as error:
        raise RecipeError(f"{source}: not a Parquet file: {_first_line(error)}") from error
    for number, record in enumerate(table.to_pylist(), 1):
        yield f"{source}:{number}", record


def _hub(source: str, default_split: str) -> Iterator[Record]:
    """Read a Hub data set as plain data; raises RecipeError for one that contains code."""
    import datasets

    match = _HUB.fullmatch(source)
    assert match is not None
    name, split = match["name"], match["split"] or default_split
    try:
        dataset = datasets.load_dataset(name, split=split)
    except RuntimeError as error:
        raise RecipeError(f"{source}: data sets that run code are not allowed: {_first_line(error)}") from error
    except ValueError as error:
        raise RecipeError(f"{source}: {_first_line(error)}") from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise MachineError(
            f"{source}: is not a file, and the Hub data set cannot be loaded: {_hub_reason(error)}"
        ) from error
    for number, record in enumerate(dataset, 1):
        yield f"{source}:{number}", record


def _hub_reason(error: Exception) -> str:
    return "HF_HUB_OFFLINE is set and the data set is not in the cache" if _offline() else _first_line(error)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_READERS: dict[str, Callable[[str], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}
