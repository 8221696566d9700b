"""Errors of a disk as the system raises them, and as libraries hide them in their own."""

import os
from pathlib import Path

WRAPPINGS = ("bare", "cause", "safetensors", "pyarrow")


def disk_error(number: int, file: Path, wrapped: str) -> Exception:
    """An error of the system about a file; those that safetensors and pyarrow hide name no file."""
    bare = OSError(number, os.strerror(number), str(file))
    if wrapped == "cause":
        outer = RuntimeError("a save failed")
        outer.__cause__ = bare
        return outer
    if wrapped == "safetensors":
        return RuntimeError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
    return OSError(f"[Errno {number}] Error writing bytes to file") if wrapped == "pyarrow" else bare
