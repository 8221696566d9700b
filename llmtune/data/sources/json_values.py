"""Parses JSON: single values, and the items of a list in a file without reading the whole of it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtune.data.sources.cursor import Cursor
from llmtune.data.sources.unpacking import LONGEST_LINE, pieces
from llmtune.errors import RecipeError

_LONGEST_INTEGER = 4300
_SPACE = re.compile(r"[ \t\n\r]*")
_CUT = 32
"""Characters from the end within which an error may come from the end of a piece."""


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


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)
parse = _DECODER.decode
"""Parses one JSON value."""


class JsonStream:
    """Reads a JSON text piece by piece, and takes marks and whole values off its front."""

    def __init__(self, path: Path, at: Cursor) -> None:
        self._pieces = pieces(path, at)
        self._text, self._place = "", 0
        self._name = at.file or at.source
        self._line, self._column = 1, 1

    def peek(self) -> str:
        """Return the next character that is no white space, without taking it; "" at the end."""
        while True:
            self._place = self._skip_space()
            if self._place < len(self._text) or not self._more():
                return self._text[self._place : self._place + 1]

    def take(self, marks: str) -> str:
        """Take the next character; raises RecipeError if it is none of these."""
        mark = self.peek()
        if not mark or mark not in marks:
            raise self._error(f"{' or '.join(marks)} is expected, not {mark!r}" if mark else "it ends too early", 0)
        self._place += 1
        return mark

    def value(self) -> Any:
        """Take the next whole value; raises RecipeError for text that is none."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                offset = error.pos - self._place
                cut = error.pos > len(self._text) - _CUT or error.msg.startswith("Unterminated string")
                if not (cut and self._more()):
                    raise self._error(error.msg, offset) from error
            else:
                if end < len(self._text):
                    self._place = end
                    return value
                if not self._more():  # a number may go on in the next piece
                    self._place = len(self._text)
                    return value

    def _more(self) -> bool:
        """Read on, as much again as is there, so that a long value is not parsed too often; False at the end."""
        waiting = self._text[self._place :]
        if len(waiting) > LONGEST_LINE:
            raise RecipeError(f"{self._name}: a row is longer than {LONGEST_LINE >> 20} MiB; no row is")
        self._count(self._text[: self._place])
        fresh: list[str] = []
        while sum(map(len, fresh)) <= len(waiting):
            piece = next(self._pieces, None)
            if piece is None:
                break
            fresh.append(piece)
        self._text, self._place = "".join((waiting, *fresh)), 0
        return bool(fresh)

    def _skip_space(self) -> int:
        match = _SPACE.match(self._text, self._place)
        assert match is not None
        return match.end()

    def _count(self, text: str) -> None:
        """Count the lines of a text that is done."""
        breaks = text.count("\n")
        self._line += breaks
        self._column = len(text) - text.rfind("\n") if breaks else self._column + len(text)

    def _error(self, problem: str, offset: int) -> RecipeError:
        self._count(self._text[: self._place + offset])
        return RecipeError(f"{self._name}: not JSON: {problem} at line {self._line} column {self._column}")


def items(stream: JsonStream, at: Cursor) -> Iterator[Any]:
    """Take the items of a list one by one; the cursor counts them."""
    for _ in _each(stream, "[", "]"):
        at.line += 1
        yield stream.value()


def members(stream: JsonStream) -> Iterator[str]:
    """Take an object's keys one by one; the caller takes each value before it asks for the next key."""
    for _ in _each(stream, "{", "}"):
        stream.peek()
        key = stream.value()
        stream.take(":")
        yield str(key)


def _each(stream: JsonStream, opening: str, closing: str) -> Iterator[None]:
    """Stop before each of what stands between two brackets, with commas between; the caller takes it."""
    stream.take(opening)
    if stream.peek() == closing:
        stream.take(closing)
        return
    mark = ","
    while mark == ",":
        yield
        mark = stream.take(f",{closing}")
