"""Files and folders that are complete or absent, whatever ends the process that writes them."""

import contextlib
import fcntl
import glob
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.files.hashes import remember

ERROR_FILE = "error.txt"
"""Where the full text of a fault of llmtune is written in a folder."""
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE*", "NOTICE*")
"""The names, as globs, of files in a folder of weights: a folder behind a link is emptied of them alone."""


def as_json(value: object) -> Any:
    """A value as JSON holds it; what JSON does not know becomes text."""
    return json.loads(json.dumps(value, default=str))


@contextlib.contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """A path to write aside; when the block ends, what stands there is on disk and takes the file's name at once.

    Each writer of a file has a path of its own; what killed ones left is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_unlocked(path.parent.glob(f".{glob.escape(path.name)}.partial-*"))
    # A folder: its lock holds where a library writes to a file of its own and renames it.
    with _temporary_folder(path) as folder:
        partial = folder / path.name
        yield partial
        sync(partial)
        partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    with write_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def write_folder(folder: Path, replace: bool = True) -> Iterator[Path]:
    """A temporary folder to fill, renamed to `folder` when the block ends: `folder` is complete or absent.

    Every file is on disk before the rename; a block that raises leaves nothing behind, and what killed processes left
    is removed. It replaces what was there; without `replace`, a folder that another process completed first stays. A
    link to a folder, or a disk that is mounted there, stays too: each file is then renamed into it. Files may be read
    by whom the umask lets.
    """
    stays = folder.is_symlink() or folder.is_mount()
    where = folder.resolve() / folder.name if stays else folder
    if stays and folder.is_dir():
        _check_linked(folder)
    where.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(where)
    with _temporary_folder(where) as partial:
        yield partial
        for file in (file for file in partial.rglob("*") if file.is_file()):
            finish(file)
        if stays:
            _replace_content(partial, folder)
            return
        if replace:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            partial.rename(folder)
        except OSError:
            if replace or not folder.is_dir():
                raise


def finish(file: Path) -> None:
    """Wait until a file is on disk, with its folder's rights where its owner alone may read it, as of safetensors."""
    if not file.is_symlink() and stat.S_IMODE(file.stat().st_mode) == 0o600:
        file.chmod(file.parent.stat().st_mode & 0o666)
    sync(file)


@contextlib.contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, locked until the block ends, when it is removed."""
    partial, descriptor = _new_locked_folder(folder)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(descriptor)


def _new_locked_folder(folder: Path) -> tuple[Path, int]:
    """A new folder beside `folder`, and the descriptor that holds its lock."""
    while True:
        partial = folder.with_name(f".{folder.name}.partial-{secrets.token_hex(6)}")
        partial.mkdir()
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(partial, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if partial.is_dir():  # else another writer took it for a leftover before it was locked
                return partial, descriptor
            os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of `folder` whose writers are dead: they hold no lock any more."""
    name = glob.escape(folder.name)
    _remove_unlocked((*folder.parent.glob(f".{name}.partial-*"), *folder.parent.glob(f"{name}.partial-*")))


def _remove_unlocked(partials: Iterable[Path]) -> None:
    for partial in partials:
        with contextlib.suppress(OSError):
            descriptor = os.open(partial, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(partial, ignore_errors=True)
            finally:
                os.close(descriptor)


def remove_at_once(folder: Path) -> None:
    """Remove a folder, whose name goes first: what a kill leaves of it counts as what killed processes left."""
    gone = folder.with_name(f".{folder.name}.partial-removed")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _replace_content(partial: Path, folder: Path) -> None:
    """Move what is in `partial`, a folder inside `folder`, to `folder`, in place of a model's files there."""
    for entry in _content(folder):
        delete(entry)
    for entry in partial.iterdir():
        entry.rename(folder / entry.name)


def _content(folder: Path) -> list[Path]:
    """What lies in a folder that a link leads to, less what a disk or a killed process left there."""
    return sorted(e for e in folder.iterdir() if e.name != "lost+found" and not e.match(".*.partial*"))


def _check_linked(folder: Path) -> None:
    """Raise LlmtuneError where a folder that a link leads to holds other things than a model's files."""
    for entry in _content(folder):
        if entry.is_dir() or not any(entry.match(pattern) for pattern in MODEL_FILES):
            remedy = "empty it, or link another folder"
            raise LlmtuneError(f"{folder}: holds {entry.name}, which is no part of a model; {remedy}")


def delete(path: Path) -> None:
    """Remove a file or folder; of a link, the link alone."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no such names.

    A file under two names must never be changed in place: what replaces a file under one leaves the other.
    """
    before = source.stat()
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(source, target)
    else:
        remember(before, target.stat())


def sync(file: Path) -> None:
    """Wait until a file's content is on disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def write_json(path: Path, value: object) -> None:
    """Write a value as readable JSON, completely or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in a file that an earlier step wrote; raises LlmtuneError where it is gone or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LlmtuneError(f"{path}: cannot be read: {error}; remove it to have it written again") from error
