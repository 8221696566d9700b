"""Paths that a user writes: any text is one, and what the system cannot look up is not there."""

from pathlib import Path


def expand_user(name: str) -> Path:
    """Return a path with `~` written out; a home folder that is not known stays as it is written."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def is_there(path: Path) -> bool:
    """Whether a file or folder exists; False for a name that no file system takes."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
