"""The cache of rows: folders of one Arrow table each, named after all that it depends on, complete or absent."""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmtune.errors import LlmtuneError, MachineError, first_line
from llmtune.files import (
    cache_folder,
    delete,
    digest_of,
    fingerprint,
    read_json,
    remove_unused,
    write_folder,
    write_json,
)
from llmtune.numbers import size
from llmtune.working import working

DATA, MANIFEST, PARTS = "rows.arrow", "manifest.json", ".parts"
LIMIT = 50 * 2**30
"""Bytes that the cache may take; entries that were not used for longest go first."""
SPARE = 2**28
"""Bytes of the disk that the cache leaves free."""
UNFINISHED = 7 * 86_400.0
"""Seconds after which what a killed process left, and nobody went on with, is removed."""
_REMEDY = "set LLMTUNE_CACHE to a folder on a larger disk"
_NO_DISK = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EPIPE)
"""Errors of the system that say nothing of a disk."""

Facts = Mapping[str, object]
Write = Callable[[pa.RecordBatch], None]


def cache_root() -> Path:
    """The folder of the cache, which only its user may read: it holds the text of rows."""
    root = cache_folder() / "rows"
    with explained(root):
        root.mkdir(parents=True, exist_ok=True)
        if root.stat().st_uid == os.getuid():
            root.chmod(0o700)
    return root


@dataclass(frozen=True)
class Entry:
    """A folder of the cache for the table that these facts decide."""

    kind: str
    facts: Facts

    @property
    def name(self) -> str:
        """The name of the folder."""
        return f"{self.kind}-{digest_of(dict(self.facts))[:32]}"

    @property
    def folder(self) -> Path:
        """Where the table is."""
        return cache_folder() / "rows" / self.name

    @property
    def parts(self) -> Path:
        """The folder for finished parts of a table that is not complete."""
        return self.folder.with_name(f".{self.name}{PARTS}")

    def open(self) -> "StoredTable | None":
        """The table, mapped into memory; None where it is absent, damaged or another one."""
        manifest = self._manifest()
        if manifest is None:
            return None
        with contextlib.suppress(OSError):
            os.utime(self.folder)
        return StoredTable(map_table(self.folder / DATA), manifest["summary"], self.folder / DATA, manifest["sha256"])

    def reopen(self) -> "StoredTable":
        """The table that was written just now."""
        stored = self.open()
        if stored is None:
            raise MachineError(f"{self.folder}: was damaged or removed while it was written")
        return stored

    def _manifest(self) -> dict[str, Any] | None:
        try:
            manifest = dict(read_json(self.folder / MANIFEST))
            same = manifest["facts"] == dict(self.facts) and isinstance(manifest["summary"], dict)
            written = {"bytes": manifest["bytes"], "sha256": manifest["sha256"]}
            return manifest if same and fingerprint(self.folder / DATA) == written else None
        except (LlmtuneError, OSError, ValueError, TypeError, KeyError):  # absent, damaged, or of another user
            return None

    def adopt(self, other: "Entry") -> None:
        """Take the table of another entry, which is gone then."""
        manifest = read_json(other.folder / MANIFEST)
        write_json(other.folder / MANIFEST, manifest | {"facts": dict(self.facts)})
        other.folder.rename(self.folder)

    @contextlib.contextmanager
    def writing(self, schema: pa.Schema, summary: dict[str, Any]) -> Iterator[Write]:
        """A function that appends record batches; the entry is there, with the summary, once the block ends.

        Raises MachineError where the disk has no room or cannot be written.
        """
        root = cache_root()
        with explained(root), write_folder(self.folder) as partial:
            with pa.OSFile(str(partial / DATA), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:

                def write(batch: pa.RecordBatch) -> None:
                    check_room(root, batch.nbytes)
                    writer.write_batch(batch)

                yield write
            written = fingerprint(partial / DATA)
            write_json(partial / MANIFEST, {"facts": dict(self.facts), **written, "summary": summary})
        shutil.rmtree(self.parts, ignore_errors=True)
        make_room(root, self.folder)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Let no other process of this user make the same entry; waits for one that does."""
        from filelock import FileLock

        root = cache_root()
        lock = FileLock(root / f".{self.name}.lock")
        waiting = working("waiting for another process that prepares the same rows")
        # Where a file system has no locks, both write the same.
        with explained(root), waiting, contextlib.suppress(NotImplementedError):
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


@dataclass(frozen=True)
class StoredTable:
    """A table, what was noted when it was made, and its file and that file's SHA-256 where it is on disk."""

    table: pa.Table
    summary: dict[str, Any]
    file: Path | None = None
    sha256: str = ""


def map_table(file: Path) -> pa.Table:
    """The table in an Arrow file, whose columns stay in the file until they are read."""
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_file(source).read_all()


@contextlib.contextmanager
def explained(root: Path) -> Iterator[None]:
    """Turn what a disk lacks into a MachineError that says where."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_DISK:
            raise
        reason = os.strerror(error.errno) if error.errno else first_line(error)
        raise MachineError(f"{root}: rows cannot be kept there: {reason}; {_REMEDY}") from error


def check_room(root: Path, needed: int, what: str = "the rows") -> None:
    """Raise MachineError where the disk of a folder has no room for so many bytes."""
    free = shutil.disk_usage(root).free
    if free < needed + SPARE:
        room = f"no room for {what}: {size(needed + SPARE)} are needed and {size(free)} are free"
        raise MachineError(f"{root}: {room}; {_REMEDY}")


def make_room(root: Path, newest: Path) -> None:
    """Remove the entries that were not used for longest until the cache is within its limit, and old leftovers."""
    for left in (*root.glob(f".*{PARTS}"), *root.glob(".*.lock")):
        with contextlib.suppress(OSError):
            if left.stat().st_mtime < time.time() - UNFINISHED:
                delete(left)
    entries = (folder for folder in root.glob("*") if folder.name[0] != "." and folder.is_dir())
    remove_unused(entries, LIMIT, [newest])
