"""Standard output and error that can show any text, and that outlive who reads them, or the disk that holds them."""

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, BinaryIO, TextIO

from llmtune.errors import MachineError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_UNREAD = (errno.EPIPE, errno.EIO)
"""A pipe whose reader is gone, and a terminal that is closed."""
_LOST: set[str] = set()
"""Why text was lost that somebody may want to read."""


class _Output(io.FileIO):
    """A file that drops what cannot be written."""

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write what can be written; gives how many bytes were taken."""
        try:
            return os.write(self.fileno(), data)
        except OSError as error:
            if error.errno not in _UNREAD:
                _LOST.add(str(error.strerror).lower())
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """Let this process go on to its end, whatever becomes of its output: what cannot be printed is dropped.

    An error would end it at any line that it prints, or leave text behind that fails once more at its end.
    """
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


def _lasting(stream: TextIO) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    output = _Output(stream.fileno(), "w", closefd=False)
    buffer: BinaryIO = output if stream.write_through else io.BufferedWriter(output)
    return io.TextIOWrapper(buffer, stream.encoding, stream.errors, "\n", stream.line_buffering, stream.write_through)


def check_printed() -> None:
    """Raise MachineError where text was lost although somebody may want to read it, as on a full disk."""
    print(end="", flush=True)
    if _LOST:
        raise MachineError(f"not all that was printed could be written: {', '.join(sorted(_LOST))}; all else is done")


def show_any_text() -> None:
    """Let stdout and stderr replace the characters that their encoding lacks, where they would raise an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")
