"""Room in a cache: what was not used for longest goes first."""

import contextlib
from collections.abc import Callable, Iterable
from math import inf
from pathlib import Path

from llmtune.files.writing import delete


def remove_unused(
    paths: Iterable[Path], limit: int, kept: Iterable[Path] = (), remove: Callable[[Path], bool] | None = None
) -> None:
    """Remove the files and folders not used for longest until they and those `kept` take `limit` bytes at most.

    `remove` tells whether one is gone. What other processes remove meanwhile counts as gone.
    """
    remove = remove or _deleted
    kept = set(kept)
    others = sorted(set(paths) - kept, key=used_at)
    sizes = {path: bytes_of(path) for path in {*others, *kept}}
    taken = sum(sizes.values())
    for path in others:
        if taken <= limit:
            return
        if remove(path):
            taken -= sizes[path]


def used_at(path: Path) -> float:
    """When a file or folder was used last, as its time says; infinity where it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return inf


def bytes_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder; of a link, its own."""
    taken = 0
    for file in (path, *path.rglob("*")) if path.is_dir() else (path,):
        with contextlib.suppress(OSError):
            taken += 0 if file.is_dir() else file.lstat().st_size
    return taken


def _deleted(path: Path) -> bool:
    with contextlib.suppress(OSError):
        delete(path)
    return not path.exists()
