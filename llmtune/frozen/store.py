"""Block outputs for rows of token ids on disk: one flat file and a manifest in a folder, complete or absent."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from llmtune.files import digest_of, remove_unused, used_at, write_folder, write_json
from llmtune.numbers import size as number_of_bytes

DATA, MANIFEST = "states.bin", "manifest.json"
SPARE = 2**28
"""Bytes of the disk that the cache leaves free."""


def longest_first(lengths: Sequence[int]) -> list[int]:
    """The order of rows in a file: longest first, so that batches of neighbors need the least padding."""
    return sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


def entry_name(facts: Mapping[str, object]) -> str:
    """The name of the folder for outputs with these facts."""
    return digest_of(facts)[:32]


def digest_of_rows(rows: Sequence[Sequence[int]]) -> str:
    """The SHA-256 of rows of token ids, each read when its turn comes."""
    digest = hashlib.sha256()
    for number in range(len(rows)):
        line_break = "\n" if number else ""
        digest.update(f"{line_break}{' '.join(map(str, rows[number]))}".encode())
    return digest.hexdigest()


class OutputWriter:
    """Appends rows of outputs, in `longest_first` order, to a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def add(self, outputs: torch.Tensor, lengths: Sequence[int]) -> None:
        """Append rows of outputs (B, T, H), each without its padding."""
        for row, length in zip(outputs.detach().cpu(), lengths, strict=True):
            content = row[:length].contiguous().view(torch.uint8).numpy().data
            self._hash.update(content)
            self._file.write(content)

    def sha256(self) -> str:
        """The SHA-256 of all that was added."""
        return self._hash.hexdigest()


@contextmanager
def write_outputs(folder: Path, facts: Mapping[str, object], size: int) -> Iterator[OutputWriter]:
    """A writer for `size` bytes of outputs; the folder is there, complete, once the block ends without an error.

    Raises OSError where the disk has no room or cannot be written.
    """
    check_room(folder.parent, size)
    with write_folder(folder) as partial:
        with (partial / DATA).open("wb") as file:
            writer = OutputWriter(file)
            yield writer
        write_json(partial / MANIFEST, {"facts": facts, "bytes": size, "sha256": writer.sha256()})


class StoredOutputs:
    """The outputs in a complete folder; rows are read by offset, so that the file takes no memory of this process."""

    def __init__(self, folder: Path, lengths: Sequence[int], width: int, dtype: torch.dtype) -> None:
        self._file = (folder / DATA).open("rb", buffering=0)
        self.lengths, self.width, self.dtype = lengths, width, dtype
        self._token_bytes = width * dtype.itemsize
        self.size = sum(lengths) * self._token_bytes
        """Bytes of all rows."""
        self._buffer = torch.empty(0, dtype=dtype)
        self._offsets = [0] * len(lengths)
        offset = 0
        for row in longest_first(lengths):
            self._offsets[row] = offset
            offset += lengths[row] * self._token_bytes

    def read(self, rows: Sequence[int], tokens: int) -> torch.Tensor:
        """Outputs (B, tokens, H), zeros on padding; valid until the next call, which uses the same memory."""
        count = len(rows) * tokens * self.width
        if self._buffer.numel() < count:
            self._buffer = torch.empty(count, dtype=self.dtype)
        outputs = self._buffer[:count].view(len(rows), tokens, self.width)
        for index, row in enumerate(rows):
            length = self.lengths[row]
            outputs[index, length:].zero_()
            self._read_row(row, outputs[index, :length])
        return outputs

    def read_packed(self, rows: Sequence[int], buffer: torch.Tensor) -> None:
        """Read rows into a buffer (tokens, H) on the host, one after the other without padding."""
        first = 0
        for row in rows:
            self._read_row(row, buffer[first : first + self.lengths[row]])
            first += self.lengths[row]

    def chunks(self, most: int) -> Iterator[list[int]]:
        """All rows, as they lie in the file, in parts of `most` bytes; a longer row is a part of its own."""
        part, taken = list[int](), 0
        for row in longest_first(self.lengths):
            size = self.lengths[row] * self._token_bytes
            if part and taken + size > most:
                yield part
                part, taken = [], 0
            part.append(row)
            taken += size
        yield part

    def forget_pages(self) -> None:
        """Let the system drop the file's pages from memory, so that the next read takes the time of the disk."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _read_row(self, row: int, target: torch.Tensor) -> None:
        content = target.view(torch.uint8).numpy().data
        if os.preadv(self._file.fileno(), [content], self._offsets[row]) != self.lengths[row] * self._token_bytes:
            raise OSError(f"{self._file.name}: was cut while in use")


def is_complete(folder: Path, facts: Mapping[str, object]) -> bool:
    """Whether a folder holds the outputs with exactly these facts, complete and unchanged."""
    manifest, data = folder / MANIFEST, folder / DATA
    if not (manifest.is_file() and data.is_file()):
        return False
    try:
        written = dict(json.loads(manifest.read_text(errors="replace")))
    except (ValueError, TypeError):  # damaged
        return False
    if written.get("facts") != facts or written.get("bytes") != data.stat().st_size:
        return False
    with data.open("rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == written.get("sha256")
    if same:
        os.utime(folder)
    return bool(same)


def check_room(root: Path, size: int) -> None:
    """Raise OSError where a folder, which is created, has no room for `size` bytes."""
    root.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(root).free < size + SPARE:
        raise OSError(f"no room for {number_of_bytes(size)} in {root}")


def make_room(root: Path, size: int, limit: int, in_use: set[Path]) -> None:
    """Delete the least recently used entries until `size` more bytes fit into `limit`."""
    day_ago = time.time() - 86_400
    # A hidden folder is being written by another process, unless it was left behind long ago.
    entries = [folder for folder in root.glob("*") if folder.name[0] != "." or used_at(folder) < day_ago]
    remove_unused((folder for folder in entries if folder.is_dir()), limit - size, in_use)
