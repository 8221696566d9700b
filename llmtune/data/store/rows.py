"""Rows that were read and checked, as a table: a row is made of it when it is asked for."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmtune.data.lazy import LazySequence
from llmtune.data.overlap import Digests, Places, RowHashes, hash_row
from llmtune.data.row import Row
from llmtune.data.store.entries import Entry, StoredTable
from llmtune.errors import RecipeError
from llmtune.working import working

IN_MEMORY, IN_MEMORY_BYTES = 2_000, 1 << 19
"""Rows, and bytes of them, up to which nothing is written to disk: they are read and encoded in half a second."""
BATCH_ROWS, BATCH_BYTES = 1_000, 4 << 20
"""Rows, and bytes of them, that are written and encoded together."""
_LABELS = ("source", "form")
"""Fields of a row by which rows are counted."""
_SCHEMA = pa.schema(
    [
        ("row", pa.large_binary()),
        *((name, pa.binary(16)) for name in RowHashes._fields),
        *((name, pa.string()) for name in _LABELS),
    ]
)


class StoredRows(LazySequence[Row]):
    """Rows of a table: those at `indices`, in that order, else all."""

    def __init__(self, stored: StoredTable, indices: Places | None = None) -> None:
        self.stored = stored
        self.indices = np.arange(stored.table.num_rows) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def item(self, place: int) -> Row:
        """Read the row at a place."""
        return _from_bytes(self.stored.table.column("row")[int(self.indices[place])].as_py())

    def take(self, places: Places) -> "StoredRows":
        """The rows at these places among these rows."""
        return StoredRows(self.stored, self.indices[places])

    def ids(self, places: Sequence[int] | Places) -> list[str]:
        """The ids of the rows at these places."""
        return [self[int(place)].id for place in places]

    @cached_property
    def contents(self) -> Digests:
        """The hashes of the rows' content."""
        return self._digests("content")

    @cached_property
    def prompts(self) -> Digests:
        """The hashes of the rows' prompts."""
        return self._digests("prompt")

    @property
    def duplicates(self) -> int:
        """How many rows repeat an earlier one exactly."""
        return len(self) - len(np.unique(self.exacts))

    def labels(self, name: str) -> npt.NDArray[Any]:
        """A field that many rows share, `source` or `form`, of each row."""
        values, codes = self._coded(name)
        return values[codes]

    def counts(self, name: str) -> dict[str, int]:
        """How many rows have each value of such a field, the first one's first."""
        values, codes = self._coded(name)
        there, first, counts = np.unique(codes, return_index=True, return_counts=True)
        return {str(values[there[at]]): int(counts[at]) for at in np.argsort(first)}

    def _coded(self, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """The values of such a field, and the place among them of each row's."""
        labels = self.stored.table.column(name).combine_chunks().dictionary_encode()
        return np.array(labels.dictionary.to_pylist(), object), labels.indices.to_numpy()[self.indices]

    @property
    def exacts(self) -> Digests:
        """The hashes of the rows as they are."""
        return self._digests("exact")

    @property
    def ignored(self) -> list[str]:
        """The names of columns that are not used."""
        return list(self.stored.summary.get("ignored", []))

    def batches(self) -> list[tuple[int, int]]:
        """Starts and ends of parts of the rows, each of a size that suits the memory: the same for the same rows."""
        sizes = self._sizes()
        ends, total, start = [], 0, 0
        for place, size in enumerate(sizes.tolist()):
            if place > start and (place - start == BATCH_ROWS or total + size > BATCH_BYTES):
                ends.append(place)
                start, total = place, 0
            total += size
        return list(itertools.pairwise([0, *ends, len(self)])) if len(self) else []

    @property
    def size(self) -> int:
        """Bytes of the rows' text."""
        return int(self._sizes().sum())

    def _sizes(self) -> npt.NDArray[np.int64]:
        chunks = self.stored.table.column("row").chunks
        offsets = [np.frombuffer(chunk.buffers()[1], np.int64)[: len(chunk) + 1] for chunk in chunks]
        sizes = [np.diff(part) for part in offsets]
        return (np.concatenate(sizes) if sizes else np.zeros(0, np.int64))[self.indices]

    def _digests(self, column: str) -> Digests:
        chunks = self.stored.table.column(column).chunks
        parts = [np.frombuffer(chunk.buffers()[1], "S16")[: len(chunk)] for chunk in chunks]
        return np.concatenate(parts)[self.indices] if parts else np.zeros(0, "S16")


NO_ROWS = StoredRows(StoredTable(_SCHEMA.empty_table(), {}))


def store_rows(rows: Iterable[Row], entry: Entry) -> StoredRows:
    """Read rows into a table, of which many are kept on disk; those that were read before are not read again."""
    stored = entry.open()
    if stored is not None:
        return StoredRows(stored)
    summary: dict[str, list[str]] = {"ignored": []}
    with working("reading the rows"):
        batches = _batches(rows, summary["ignored"])
        head, count, read = list[pa.RecordBatch](), 0, 0
        while are_few(count, read) and (batch := next(batches, None)) is not None:
            head.append(batch)
            count, read = count + batch.num_rows, read + batch.column("row").nbytes
        if are_few(count, read):
            return StoredRows(StoredTable(pa.Table.from_batches(head, _SCHEMA), summary))
        with entry.locked():
            stored = entry.open()  # another process may have written it meanwhile
            return StoredRows(stored or _write(entry, itertools.chain(head, batches), summary))


def are_few(rows: int, size: int) -> bool:
    """Whether so many rows, of so many bytes, are read and encoded faster than what was kept of them is found."""
    return rows <= IN_MEMORY and size <= IN_MEMORY_BYTES


def _write(entry: Entry, batches: Iterable[pa.RecordBatch], summary: dict[str, list[str]]) -> StoredTable:
    with entry.writing(_SCHEMA, summary) as write:
        for batch in batches:
            write(batch)
    return entry.reopen()


def _batches(rows: Iterable[Row], ignored: list[str]) -> Iterator[pa.RecordBatch]:
    """Gather rows and their hashes in batches, and collect the names of columns that are not used."""
    names = set[str]()
    values, taken = list[tuple[Any, ...]](), 0
    for row in rows:
        names.update(row.ignored)
        values.append((_to_bytes(row), *hash_row(row), *(getattr(row, name, "") for name in _LABELS)))
        taken += len(values[-1][0])
        if len(values) == BATCH_ROWS or taken >= BATCH_BYTES:
            yield _batch(values)
            values, taken = [], 0
    if values:
        yield _batch(values)
    ignored[:] = sorted(names)


def _batch(values: list[tuple[Any, ...]]) -> pa.RecordBatch:
    columns = zip(*values, strict=True)
    return pa.record_batch(
        [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA
    )


def _to_bytes(row: Row) -> bytes:
    """A row as JSON; raises RecipeError for a value that JSON has not, such as a date in a tool's arguments."""
    try:
        text = json.dumps(vars(row), ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{row.where}: holds a value that is not plain data: {error}") from error
    return text.encode("utf-8", "surrogatepass")


def _from_bytes(content: bytes) -> Row:
    values: dict[str, Any] = json.loads(content.decode("utf-8", "surrogatepass"))
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return Row(**fields)
