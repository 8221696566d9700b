"""Which places are URLs of a store, and the folders here in which their runs are worked on."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.errors import MachineError, RecipeError, first_line, nearest
from llmtune.files import cache_folder, digest_of, read_json, write_json

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

STATE = "store.json"
"""Beside the folder of a run that is on a store: its URL, and what is known of the files there."""
_URL = re.compile(r"([A-Za-z][\w+.-]+(?:::[A-Za-z][\w+.-]+)*):/")


def url_of(place: Path | str) -> str | None:
    """The URL that a user gave as a run's folder, such as s3://bucket/run; None for a path.

    One slash is read as two: a Path keeps no more.
    """
    text = str(place)
    match = _URL.match(text)
    if match is None:
        return None
    scheme, rest = match[1], text[match.end() :]
    rest = f"/{rest.lstrip('/')}" if scheme not in ("file", "local") else f"//{rest.lstrip('/')}"
    return f"{scheme}:/{rest}".rstrip("/")


def run_folder(place: Path | str) -> Path:
    """The folder in which a run is worked on: a path as it is, for a URL a folder in the cache that belongs to it."""
    url = url_of(place)
    if url is None:
        return Path(place)
    name = url.rpartition("/")[2]
    if url.endswith(":") or not name:
        raise RecipeError(f"{place}: names no folder; give one, such as {url.rstrip('/:')}://bucket/run")
    folder = cache_folder() / "stores" / digest_of(url)[:16]
    if not (folder / STATE).is_file():
        write_json(folder / STATE, {"url": url})
    return folder / name


def stored_at(folder: Path) -> str | None:
    """The URL of the store that the run in a folder belongs to; None for a run that is here alone."""
    state = folder.absolute().parent / STATE
    return str(read_json(state)["url"]) if state.parent.parent.name == "stores" and state.is_file() else None


def connect(url: str) -> tuple["AbstractFileSystem", str]:
    """The file system of a URL, and the URL's path in it.

    Raises RecipeError for a scheme that fsspec does not know, and MachineError where its package is missing.
    """
    from fsspec import available_protocols
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    scheme = url.partition(":")[0]
    try:
        return url_to_fs(url)
    except ImportError as error:
        package = str(known_implementations.get(scheme, {}).get("class", "")).partition(".")[0]
        command = f"; pip install {package}" if package not in ("", "fsspec") else ""
        raise MachineError(f"{url}: needs a package that is not here: {first_line(error)}{command}") from error
    except ValueError as error:
        known = nearest(scheme, available_protocols()) or "; s3, gs and abfs are some that it knows"
        if scheme in known_implementations:
            raise RecipeError(f"{url}: {first_line(error)}") from error
        raise RecipeError(f"{url}: fsspec knows no store {scheme!r}{known}") from error
    except Exception as error:
        raise MachineError(f"{url}: cannot be reached: {first_line(error)}") from error
