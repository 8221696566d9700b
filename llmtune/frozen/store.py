"""Hidden states of token sequences on disk: one flat file and a manifest, complete or absent."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llmtune.files import write_json

DATA, MANIFEST = "states.bin", "manifest.json"
SPARE = 2**28


def longest_first(lengths: Sequence[int]) -> list[int]:
    """The order in which rows stand in a file; padding is least where neighbours are computed together."""
    return sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


def entry_name(facts: dict[str, Any]) -> str:
    """The name of the folder of states with these facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


class OutputWriter:
    """Takes the states of rows in `longest_first` order; nothing is to be seen under the final name before `seal`.

    As a context manager it leaves nothing behind where that does not come.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], size: int) -> None:
        """Reserve `size` bytes; raises OSError where the disk has no room for them or cannot be written."""
        self._folder, self._facts, self._size = folder, facts, size
        self._partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
        check_room(folder.parent, size)
        self._partial.mkdir(parents=True, exist_ok=True)
        self._file = (self._partial / DATA).open("wb")
        self._hash = hashlib.sha256()

    def add(self, states: torch.Tensor, lengths: Sequence[int]) -> None:
        """Append rows of states (B, T, H), each without its padding."""
        for row, length in zip(states.detach().cpu(), lengths, strict=True):
            content: Any = row[:length].contiguous().view(torch.uint8).numpy()
            self._hash.update(content)
            self._file.write(content)

    def seal(self) -> None:
        """Make the folder complete: data on disk, then the manifest, then one rename."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        found = {"facts": self._facts, "bytes": self._size, "sha256": self._hash.hexdigest()}
        write_json(self._partial / MANIFEST, found)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._partial.rename(self._folder)

    def __enter__(self) -> "OutputWriter":
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._file.close()


class StoredOutputs:
    """The states in a complete folder; rows are read by offset, so that the file takes no memory of this process."""

    def __init__(self, folder: Path, lengths: Sequence[int], width: int, dtype: torch.dtype) -> None:
        self._file = (folder / DATA).open("rb", buffering=0)
        self._lengths, self._token = lengths, width * dtype.itemsize
        self._buffer = torch.empty(0, dtype=dtype)
        self._width = width
        self._offsets = [0] * len(lengths)
        at = 0
        for row in longest_first(lengths):
            self._offsets[row] = at
            at += lengths[row] * self._token

    def read(self, rows: Sequence[int], tokens: int) -> torch.Tensor:
        """States (B, tokens, H), zeros on padding; valid until the next call, which uses the same memory."""
        count = len(rows) * tokens * self._width
        if self._buffer.numel() < count:
            self._buffer = torch.empty(count, dtype=self._buffer.dtype)
        states = self._buffer[:count].view(len(rows), tokens, self._width)
        for place, row in enumerate(rows):
            length = self._lengths[row]
            states[place, length:].zero_()
            target: Any = states[place, :length].view(torch.uint8).numpy()
            if os.preadv(self._file.fileno(), [target], self._offsets[row]) != length * self._token:
                raise OSError(f"{self._file.name}: was cut while in use")
        return states


def is_complete(folder: Path, facts: dict[str, Any]) -> bool:
    """Whether a folder holds the states with exactly these facts, whole and unchanged."""
    manifest, data = folder / MANIFEST, folder / DATA
    if not (manifest.is_file() and data.is_file()):
        return False
    try:
        found = dict(json.loads(manifest.read_text(errors="replace")))
    except (ValueError, TypeError):  # damaged
        return False
    if found.get("facts") != facts or found.get("bytes") != data.stat().st_size:
        return False
    with data.open("rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == found.get("sha256")
    if same:
        os.utime(folder)
    return bool(same)


def check_room(root: Path, size: int) -> None:
    """Raise OSError where a folder, which is made, has no room for `size` bytes."""
    root.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(root).free < size + SPARE:
        raise OSError(f"no room for {size / 2**30:.2f} GB in {root}")


def make_room(root: Path, size: int, limit: int, using: set[Path]) -> None:
    """Delete the states that were used longest ago until `size` more bytes fit into `limit`."""
    day_ago = time.time() - 86_400
    # A hidden folder is being written by another process, unless it was left behind long ago.
    old = (folder for folder in root.glob("*") if folder.name[0] != "." or folder.stat().st_mtime < day_ago)
    others = [folder for folder in old if folder.is_dir() and folder not in using]
    others.sort(key=lambda folder: folder.stat().st_mtime)
    held = {folder: sum(file.stat().st_size for file in folder.glob("*")) for folder in {*others, *using}}
    while others and sum(held.values()) + size > limit:
        oldest = others.pop(0)
        shutil.rmtree(oldest, ignore_errors=True)
        held.pop(oldest)
