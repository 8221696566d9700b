"""Reads a part of a recipe's data into a table, once for the same files."""

import secrets
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmtune.data import sources
from llmtune.data.row import Row
from llmtune.data.rows import SPLITS, Form, iterate
from llmtune.data.store.build import code_digest
from llmtune.data.store.entries import Entry, cache_root, explained
from llmtune.data.store.rows import NO_ROWS, StoredRows, store_rows
from llmtune.errors import RecipeError
from llmtune.files import digest_of, fingerprint
from llmtune.recipe.data import Data


def read_part(data: Data, part: str) -> StoredRows:
    """All rows of the sources of train, eval or test; of a mixture, each with its source.

    Raises RecipeError at the first bad row, MachineError where a disk has no room for many rows.
    """
    named = data.source_keys(part)
    if not named:
        return NO_ROWS
    files = fingerprints(data, part)
    form = Form.of(data)
    facts: dict[str, object] = {
        "sources": files,
        "split": SPLITS[part],
        "mixture": not isinstance(getattr(data, part), str),
        "form": [form.format, dict(form.map)],
        "code": code_digest(),
        "versions": {name: version(name) for name in ("datasets", "pyarrow")},
    }
    unknown = None in files.values()
    entry = Entry("rows", facts | ({"read": secrets.token_hex(16)} if unknown else {}))
    rows = store_rows(_iterate(data, part), entry)
    if fingerprints(data, part) != files:
        raise RecipeError(f"{next(iter(named.values()))}: was changed while it was read; start again")
    return _by_content(entry, rows) if unknown and rows.stored.file else rows


def fingerprints(data: Data, part: str) -> dict[str, dict[str, Any] | None]:
    """Size and SHA-256 of each source of a part, of all its files together; None for a Hub data set."""
    measured = {}
    for source in data.source_keys(part).values():
        with sources.explained(sources.Cursor(source)):
            measured[source] = _of_files(sources.source_files(source, SPLITS[part]))
    return measured


def _of_files(files: list[Path]) -> dict[str, Any] | None:
    """Size and SHA-256 of a file; of several, the size of all, and the SHA-256 of their names and own digests."""
    measured = [fingerprint(file) for file in files]
    if len(measured) < 2:
        return measured[0] if measured else None
    digest = digest_of([[file.name, one["sha256"]] for file, one in zip(files, measured, strict=True)])
    return {"files": len(files), "bytes": sum(one["bytes"] for one in measured), "sha256": digest}


def _iterate(data: Data, part: str) -> Iterator[Row]:
    form, split = Form.of(data), SPLITS[part]
    if isinstance(getattr(data, part), str):
        yield from iterate(getattr(data, part), split, form)
        return
    for one in data.sources(part):
        for row in iterate(one.source, split, form):
            yield replace(row, source=one.source)


def _by_content(entry: Entry, rows: StoredRows) -> StoredRows:
    """The same rows under the name of their content: those of a Hub data set lie on disk once, however often read."""
    known = Entry("rows", {"content": rows.stored.sha256})
    with explained(cache_root()), known.locked():
        if known.open() is None:
            shutil.rmtree(known.folder, ignore_errors=True)
            known.adopt(entry)
        else:
            shutil.rmtree(entry.folder)
    return StoredRows(known.reopen())
