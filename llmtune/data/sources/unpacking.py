"""Opens text files, packed or not, and gives their lines or pieces; one that grows without end is refused."""

import contextlib
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from llmtune.data.sources.cursor import Cursor
from llmtune.errors import RecipeError

LONGEST_LINE = 64 << 20
"""Bytes of a line, of a row of a JSON list, and characters of a CSV cell."""
# Rows of text shrink to a twentieth at most; a file that grows more than this is damaged or meant to fill the memory.
_MOST_GROWTH, _GROWTH_FROM = 300, 32 << 20
_BUFFER = 1 << 20
PACKINGS = (".gz", ".zst")
"""Endings of packed files."""


def lines(path: Path, at: Cursor) -> Iterator[str]:
    """Read the lines of a UTF-8 file; the cursor is moved before a line is decoded."""
    growth = _Growth(path, at)
    with _open(path) as file:
        while raw := file.readline(LONGEST_LINE + 1):
            at.line += 1
            if len(raw) > LONGEST_LINE:
                size = f"{LONGEST_LINE >> 20} MiB"
                raise RecipeError(f"{at.where}: the line is longer than {size}; divide it into shorter ones")
            growth.add(len(raw))
            yield (raw.removeprefix(b"\xef\xbb\xbf") if at.line == 1 else raw).decode("utf-8")


def pieces(path: Path, at: Cursor) -> Iterator[str]:
    """Read a UTF-8 file in pieces of a MiB, cut anywhere; raises RecipeError for bytes that are no UTF-8."""
    growth, decoder = _Growth(path, at), _decoder()
    with _open(path) as file:
        while True:
            raw = file.read(_BUFFER)
            growth.add(len(raw))
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                place = growth.total - len(raw) + error.start + 1
                message = f"{at.file or at.source}: not UTF-8 text (byte {place}); save the file as UTF-8"
                raise RecipeError(message) from error
            if text:
                yield text
            if not raw:
                return


def _decoder() -> Any:
    import codecs

    return codecs.getincrementaldecoder("utf-8-sig")()


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a file, unpacked where it ends in .gz or .zst."""
    packing = path.suffix.lower()
    if packing == ".gz":
        with gzip.open(path, "rb") as file:
            yield cast(BinaryIO, file)
    elif packing == ".zst":
        import pyarrow

        with path.open("rb") as packed, pyarrow.CompressedInputStream(packed, "zstd") as stream:
            yield cast(BinaryIO, io.BufferedReader(stream, _BUFFER))
    else:
        with path.open("rb") as file:
            yield file


class _Growth:
    """Counts what a packed file unpacks to; refuses one that grows more than rows of text do."""

    def __init__(self, path: Path, at: Cursor) -> None:
        self._packed = path.stat().st_size if path.suffix.lower() in PACKINGS else None
        self._at, self.total = at, 0

    def add(self, count: int) -> None:
        """Count bytes; raises RecipeError for too many."""
        self.total += count
        if self._packed is not None and self.total > max(_GROWTH_FROM, self._packed * _MOST_GROWTH):
            raise RecipeError(
                f"{self._at.where}: {self._packed} bytes unpack to over {self.total >> 20} MiB, "
                "more than rows of text do"
            )
