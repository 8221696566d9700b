"""Standard output and error that can show any text, whatever the encoding of the terminal."""

import io
import sys


def show_any_text() -> None:
    """Let stdout and stderr replace the characters that their encoding lacks, where they would raise an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")
