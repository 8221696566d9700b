"""Room for bases with new tokens in the cache: those used least recently go first, and none that a process uses."""

import contextlib
import fcntl
import os
from pathlib import Path

from filelock import FileLock

from llmtune.files import remove_at_once, remove_unused

LIMIT = 20 * 2**30
"""Bytes that they may take."""
_HELD: dict[Path, int] = {}
"""Folders that this process uses, each with a descriptor that holds its lock until the process ends."""


def hold_until_end(folder: Path) -> None:
    """Note that a folder is used now, and let no process remove it before this one ends."""
    with contextlib.suppress(OSError):  # a file system without locks: there nothing is removed
        os.utime(folder)
        descriptor = os.open(folder, os.O_RDONLY)
        before = _HELD.pop(folder, None)
        if before is not None:
            os.close(before)
        _HELD[folder] = descriptor
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def make_room(root: Path, locks: Path) -> None:
    """Remove folders that were not used for longest until all are within the limit, but none that is in use."""
    folders = (folder for folder in root.glob("*") if folder.name[0] != "." and folder.is_dir())
    remove_unused(folders, LIMIT, remove=lambda folder: _remove(folder, lock_of(folder, locks)))


def lock_of(folder: Path, locks: Path) -> FileLock:
    """The lock under which a folder is written, first used, and removed."""
    return FileLock(locks / f"extended-{folder.name}.lock")


def _remove(folder: Path, lock: FileLock) -> bool:
    """Remove a folder at once; returns whether no other process uses it and it is gone."""
    with contextlib.suppress(OSError), lock.acquire(timeout=0):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_at_once(folder)
        finally:
            os.close(descriptor)
        return True
    return False
