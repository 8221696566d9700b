"""Readers of files: each gives the records of one kind of file, and moves a cursor to the place of each."""

import csv
import glob
import gzip
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from llmtune.data.sources.cursor import Cursor
from llmtune.errors import RecipeError, first_line

LONGEST_LINE = 64 << 20
"""Bytes of a line, and characters of a CSV cell."""
# Rows of text shrink to a twentieth at most; a file that grows more than this is damaged or meant to fill the memory.
_MOST_GROWTH, _GROWTH_FROM = 300, 32 << 20
_LONGEST_INTEGER = 4300

Reader = Callable[[Path, Cursor], Iterator[Any]]


def _json_lines(path: Path, at: Cursor) -> Iterator[Any]:
    """Read one JSON value per line; blank lines are skipped."""
    for line in _lines(path, at):
        if line.strip():
            yield json.loads(line, object_pairs_hook=_object, parse_int=_integer)


def _csv(path: Path, at: Cursor) -> Iterator[dict[str, str]]:
    """Read a CSV file with a header; the place of a record is the line on which it starts."""
    csv.field_size_limit(LONGEST_LINE)
    reader = csv.reader(_split_at_returns(_lines(path, at)), strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        cells = _next_cells(reader, start, at)
        if cells is None:
            return
        if header is None:
            header = _checked_header(cells, at)
        elif cells and len(cells) != len(header):
            raise RecipeError(f"{at.where}: {len(cells)} cells where the header names {len(header)} columns")
        elif cells:
            yield dict(zip(header, cells, strict=True))


def _columnar(builder: str, title: str, **options: int) -> Reader:
    """Make a reader of files in columns; `datasets` reads them as a stream, without a copy in its cache."""

    def read(path: Path, at: Cursor) -> Iterator[Any]:
        import datasets

        logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it prints what it also raises
        try:
            files = glob.escape(str(path))
            rows = datasets.load_dataset(builder, data_files=files, split="train", streaming=True, **options)
            for number, record in enumerate(rows, 1):
                at.line = number
                yield record
        except Exception as error:
            raise RecipeError(f"{at.where}: not {title}, or a damaged one: {first_line(error)}") from error

    return read


READERS: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".csv": _csv,
    ".parquet": _columnar("parquet", "a Parquet file", batch_size=1000),  # else it fails where there are no rows
    ".arrow": _columnar("arrow", "an Arrow file"),
}
"""The reader of each ending of a file's name."""


def _lines(path: Path, at: Cursor) -> Iterator[str]:
    """Read the lines of a UTF-8 file, unpacked where it ends in .gz; the cursor is moved before a line is decoded."""
    packed = path.stat().st_size if path.suffix.lower() == ".gz" else None
    total = 0
    with cast(BinaryIO, gzip.open(path, "rb") if packed is not None else path.open("rb")) as file:
        while raw := file.readline(LONGEST_LINE + 1):
            at.line += 1
            total += len(raw)
            if len(raw) > LONGEST_LINE:
                raise RecipeError(f"{at.where}: the line is longer than {LONGEST_LINE >> 20} MiB; no row is")
            if packed is not None and total > max(_GROWTH_FROM, packed * _MOST_GROWTH):
                raise RecipeError(
                    f"{at.where}: {packed} bytes unpack to over {total >> 20} MiB, more than rows of text do"
                )
            yield (raw.removeprefix(b"\xef\xbb\xbf") if at.line == 1 else raw).decode("utf-8")


def _split_at_returns(lines: Iterator[str]) -> Iterator[str]:
    """Split lines at carriage returns that no line feed follows, which old programs end lines with."""
    for line in lines:
        yield from re.split(r"(?<=\r)(?=[^\n])", line)


def _next_cells(reader: Any, start: int, at: Cursor) -> list[str] | None:
    """Return the next record's cells, None at the end; the cursor is put on the line on which it starts."""
    try:
        cells: list[str] | None = next(reader, None)
    except csv.Error:
        at.line = start
        raise
    at.line = start
    return cells


def _checked_header(names: list[str], at: Cursor) -> list[str]:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"{at.where}: the header names the column {twice!r} twice")
    return names


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; raises ValueError for a key that it has twice, of which one would be lost."""
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return value


def _integer(digits: str) -> int:
    """Make a JSON integer; raises ValueError for one that Python would refuse with a hint for programmers."""
    if len(digits) > _LONGEST_INTEGER:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)
