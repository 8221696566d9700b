"""Folders: those that ship with llmtune, the user's home, and the cache; and the lock of a folder."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llmtune.errors import MachineError, RecipeError

_PACKAGE = Path(__file__).parents[1]


def shipped_folder(name: str) -> Path:
    """A folder that ships with llmtune, in an installed wheel or in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def user_path(text: str) -> Path:
    """The path that a user wrote, with `~` as a home folder; raises RecipeError where there is no such home."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise RecipeError(f"{text}: this machine knows no home folder for {Path(text).parts[0]}") from error


def home_folder() -> Path | None:
    """The user's home folder, None where the machine knows none."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def cache_folder() -> Path:
    """The folder for files that can be rebuilt: $LLMTUNE_CACHE, or llmtune in the user's cache folder.

    A user without a home has it in the folder for temporary files; raises MachineError where another user took it.
    """
    root, user = os.environ.get("LLMTUNE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if root or user:
        return Path(root) if root else Path(str(user)) / "llmtune"
    home = home_folder()
    if home is not None:
        return home / ".cache" / "llmtune"
    folder = Path(tempfile.gettempdir()) / f"llmtune-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise MachineError(f"{folder}: belongs to another user; set LLMTUNE_CACHE to a folder of yours")
    return folder


@contextlib.contextmanager
def hold(file: Path, busy: str) -> Iterator[None]:
    """Hold the lock of a file, which is made where it is missing, and which the system releases when this process ends.

    Raises RecipeError with the message `busy` where another process holds it, and MachineError where the folder cannot
    be written to or its file system has no locks.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RecipeError(busy) from error
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MachineError(
            f"{file.parent}: cannot be locked and written to: {reason}; choose another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()
