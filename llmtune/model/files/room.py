"""Room for bases that were made in the cache: those used least recently go first, and none that a process uses."""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from filelock import FileLock

from llmtune.files import remove_at_once, remove_unused

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


def make_room(root: Path, locks: Path, limit: int) -> None:
    """Remove folders that were not used for longest until all take `limit` bytes at most, but none that is in use."""
    for left in root.glob(".*.partial-removed"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    folders = (folder for folder in root.glob("*") if folder.name[0] != "." and folder.is_dir())
    remove_unused(folders, limit, remove=lambda folder: _remove(folder, lock_of(folder, locks)))


def lock_of(folder: Path, locks: Path) -> FileLock:
    """The lock under which a folder is written, first used, and removed."""
    return FileLock(locks / f"{folder.parent.name}-{folder.name}.lock")


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
