"""The SHA-256 of files and of values; a file is read once until it changes."""

import hashlib
import io
import json
import os
import time
from pathlib import Path
from typing import Any

FINE, COARSE = 50_000_000, 3_000_000_000
"""Nanoseconds within which two changes may have the same time: by a kernel's clock, and on disks that keep seconds."""
PART = 2**24
"""Bytes that are hashed without the interpreter: a busy one gives a thread its turn every 5 ms."""
Stamp = tuple[int, int, int]
"""Size, time of the last change of the content, and of the last change of anything."""
_KNOWN: dict[tuple[int, int], tuple[Stamp, str]] = {}
"""Stamp and SHA-256 of the files that this process hashed, by device and inode."""


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, which is read once in this process until it changes."""
    with path.open("rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        known = _KNOWN.get(_inode(before))
        if known is None or known[0] != _stamp(before):
            known = _stamp(before), _sha256(file, before.st_size)
            if _stamp(os.fstat(file.fileno())) == known[0] and _is_settled(before):
                _KNOWN[_inode(before)] = known
    return {"bytes": before.st_size, "sha256": known[1]}


def _sha256(file: io.FileIO, size: int) -> str:
    """The SHA-256 of an open file, read in parts so large that a thread that hashes seldom waits for the others."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(max(1, min(size, PART))))
    while count := file.readinto(buffer):
        digest.update(buffer[:count])
    return digest.hexdigest()


def remember(before: os.stat_result, now: os.stat_result) -> None:
    """Keep what is known of a file's content when a second name has changed the rest of its stamp."""
    known = _KNOWN.get(_inode(before))
    if known and known[0] == _stamp(before) and _stamp(now)[:2] == _stamp(before)[:2]:
        _KNOWN[_inode(now)] = _stamp(now), known[1]


def _inode(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _stamp(stat: os.stat_result) -> Stamp:
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _is_settled(stat: os.stat_result) -> bool:
    """Whether the last change is so long ago that the next one will have another time."""
    changed = max(stat.st_mtime_ns, stat.st_ctime_ns)
    in_seconds = changed % 10**9 == 0
    return time.time_ns() - changed > (COARSE if in_seconds else FINE)


def are_fingerprints(value: object) -> bool:
    """Whether a JSON value holds fingerprints by file name."""
    return isinstance(value, dict) and all(
        isinstance(one, dict) and isinstance(one.get("bytes"), int) and isinstance(one.get("sha256"), str)
        for one in value.values()
    )


def digest_of(value: object) -> str:
    """The SHA-256 of a text in UTF-8, or of any other value as JSON with sorted keys."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_files(folder: Path, pattern: str) -> str:
    """The SHA-256 of the names and contents of a folder's files, in its own folders too."""
    files = sorted(file for file in folder.rglob(pattern) if file.is_file())
    return digest_of([[str(file.relative_to(folder)), hashlib.sha256(file.read_bytes()).hexdigest()] for file in files])
