"""Readers of text files: JSON, CSV and plain text; each gives records, and moves a cursor to the place of each."""

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmtune.data.sources.cursor import Cursor
from llmtune.data.sources.json_values import JsonStream, items, members, parse
from llmtune.data.sources.unpacking import LONGEST_LINE, lines
from llmtune.errors import RecipeError

Reader = Callable[[Path, Cursor], Iterator[Any]]
LONG_TEXT = 64 << 10
"""Characters after which a plain text is cut at the next blank line, so that some of it can be held out."""
LONGEST_TEXT = 16 * LONG_TEXT
_SEPARATORS = ("\f", "<|endoftext|>")
"""Lines that end a document of a plain text."""


def json_lines(path: Path, at: Cursor) -> Iterator[Any]:
    """Read one JSON value per line; blank lines are skipped."""
    for line in lines(path, at):
        if not line.isspace():
            yield parse(line)


def json_list(path: Path, at: Cursor) -> Iterator[Any]:
    """Read the items of a JSON list, or of the list under "data"; a .json file of JSON lines is read as such."""
    stream = JsonStream(path, at)
    first = stream.peek()
    if first == "[":
        yield from items(stream, at)
        _refuse_rest(stream, at)
    elif first == "{":
        yield from _json_object(stream, path, at)
    elif first:
        raise RecipeError(f"{at.where}: is JSON, but no list of rows")


def _json_object(stream: JsonStream, path: Path, at: Cursor) -> Iterator[Any]:
    keys, rows = [], False
    for key in members(stream):
        keys.append(key)
        if key == "data" and stream.peek() == "[":
            rows = True
            yield from items(stream, at)
        else:
            stream.value()
    if rows:
        _refuse_rest(stream, at)
    elif stream.peek():  # more objects follow
        at.enter(at.file)
        yield from json_lines(path, at)
    else:
        names = ", ".join(keys[:8]) or "none"
        raise RecipeError(
            f"{at.where}: is one JSON object, with the keys {names}; a list of rows is expected, alone or as "
            '{"data": [...]}'
        )


def _refuse_rest(stream: JsonStream, at: Cursor) -> None:
    if stream.peek():
        raise RecipeError(f"{at.where}: not JSON: something follows the list of rows")


def table(delimiter: str) -> Reader:
    """Make a reader of tables with a header; the place of a record is the line on which it starts."""

    def read(path: Path, at: Cursor) -> Iterator[dict[str, str]]:
        csv.field_size_limit(LONGEST_LINE)
        reader = csv.reader(_split_at_returns(lines(path, at)), strict=True, delimiter=delimiter)
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

    return read


def plain_text(path: Path, at: Cursor) -> Iterator[dict[str, str]]:
    """Read a text as a document; a line with a form feed or <|endoftext|> ends one, and a long one is cut.

    The cut is behind the blank lines after `LONG_TEXT` characters, or after `LONGEST_TEXT` at the end of any line; the
    pieces together are the document. The cursor is put on the line on which a piece starts, and told of the cuts.
    """
    parts: list[str] = []
    size = start = 0
    for line, text in enumerate(lines(path, at), 1):
        ends = text.strip(" \r\n") in _SEPARATORS
        is_blank = text.isspace()
        if not ends and not is_blank and (size > LONGEST_TEXT or (size > LONG_TEXT and parts[-1].isspace())):
            yield from _piece("".join(parts), at, start, line, goes_on=True)
            parts, size = [], 0
        if not ends and (size <= LONGEST_TEXT if parts and is_blank else not is_blank):
            start = start if parts else line
            parts.append(text)
            size += len(text)
        if ends:
            yield from _piece("".join(parts).rstrip(), at, start, line)
            parts, size = [], 0
    yield from _piece("".join(parts).rstrip(), at, start, at.line)


def _piece(text: str, at: Cursor, start: int, line: int, goes_on: bool = False) -> Iterator[dict[str, str]]:
    """Yield a text that starts on a line; afterwards the cursor is on the line that was read last."""
    if text:
        at.line, at.goes_on = start, goes_on
        yield {"text": text}
        at.continues = at.where if goes_on else ""
        at.line, at.goes_on = line, False


def _split_at_returns(lines: Iterator[str]) -> Iterator[str]:
    """Split lines at carriage returns that no line feed follows, which old programs end lines with."""
    for line in lines:
        if "\r" in line[:-2]:
            yield from re.split(r"(?<=\r)(?=[^\n])", line)
        else:
            yield line


def _next_cells(reader: Iterator[list[str]], start: int, at: Cursor) -> list[str] | None:
    """Return the next record's cells, None at the end; the cursor is put on the line on which it starts."""
    try:
        cells = next(reader, None)
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
