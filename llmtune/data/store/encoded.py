"""Encoded rows as a table: lengths are read without tokens, and an example is made when it is asked for."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmtune.data.example import IGNORED, Encoded, Example
from llmtune.data.lazy import LazySequence

Tokens = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]
_TYPES = {"str": pa.string(), "int": pa.int64(), "bool": pa.bool_()}
_PLAIN = [field for field in dataclasses.fields(Example) if field.name not in ("input_ids", "labels")]
_LIST = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("input_ids", _LIST),
        pa.field("learned", _LIST),
        ("supervised", pa.int64()),
        ("row", pa.int64()),
        *((field.name, _TYPES[str(getattr(field.type, "__name__", field.type))]) for field in _PLAIN),
    ]
)
"""`learned` holds starts and ends of what is learned, `row` the place of an example's row among the encoded ones."""
Summary = dict[str, Any]
"""What is known of encoded rows beside their examples: the other fields of Encoded, by name, and more."""


class EncodedRows(LazySequence[Example]):
    """The examples of a table."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._starts = np.cumsum([0, *(len(chunk) for chunk in table.column("row").chunks)])
        self._tokens = [_parts(chunk) for chunk in table.column("input_ids").chunks]
        self._spans = [_parts(chunk) for chunk in table.column("learned").chunks]

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def item(self, place: int) -> Example:
        """Make the example at a place."""
        plain = {field.name: self._table.column(field.name)[place].as_py() for field in _PLAIN}
        return Example(input_ids=self.tokens(place).tolist(), labels=self.labels(place).tolist(), **plain)

    @cached_property
    def lengths(self) -> Counts:
        """The tokens of each example."""
        lengths = [np.diff(offsets) for offsets, _ in self._tokens]
        return np.concatenate(lengths).astype(np.int64) if lengths else np.zeros(0, np.int64)

    @cached_property
    def supervised(self) -> Counts:
        """The learned tokens of each example."""
        return self._numbers("supervised")

    @cached_property
    def targets(self) -> Counts:
        """The learned tokens of each example that are predicted: the first is not."""
        firsts = [_starts_at_zero(offsets, values) for offsets, values in self._spans]
        return self.supervised - (np.concatenate(firsts) if firsts else 0)

    @cached_property
    def rows(self) -> Counts:
        """The place of each example's row among the rows that were encoded."""
        return self._numbers("row")

    @cached_property
    def is_text(self) -> npt.NDArray[np.bool_]:
        """Whether each example is a piece of plain text."""
        values = self._table.column("is_text").to_numpy()
        return np.asarray(values, bool)

    def tokens(self, place: int) -> Tokens:
        """The token ids of an example, which must not be changed."""
        return self._part(self._tokens, place)

    def labels(self, place: int) -> Tokens:
        """The labels of an example."""
        ids = self.tokens(place)
        labels = np.full(len(ids), IGNORED, np.int32)
        for start, end in self._part(self._spans, place).reshape(-1, 2).tolist():
            labels[start:end] = ids[start:end]
        return labels

    def ids(self, places: Iterable[int]) -> list[str]:
        """The ids of the examples at these places."""
        return [self._table.column("id")[int(place)].as_py() for place in places]

    def _part(self, parts: list[tuple[Tokens, Tokens]], place: int) -> Tokens:
        chunk = int(np.searchsorted(self._starts, place, side="right")) - 1
        offsets, values = parts[chunk]
        at = place - int(self._starts[chunk])
        return values[offsets[at] : offsets[at + 1]]

    def _numbers(self, column: str) -> Counts:
        return np.asarray(self._table.column(column).to_numpy(), np.int64)


class TokenIds(LazySequence[list[int]]):
    """The token ids of examples, one part's after the other's."""

    def __init__(self, *parts: Sequence[Example]) -> None:
        self._parts = parts
        self.lengths: list[int] = [length for part in parts for length in lengths_of(part)]
        """The tokens of each row."""

    def __len__(self) -> int:
        return len(self.lengths)

    def item(self, place: int) -> list[int]:
        """Read the token ids of the row at a place."""
        for part in self._parts:
            if place < len(part):
                return part.tokens(place).tolist() if isinstance(part, EncodedRows) else part[place].input_ids
            place -= len(part)
        raise IndexError(place)


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """The tokens of each example, read without the tokens where they are stored."""
    if isinstance(examples, EncodedRows):
        lengths: list[int] = examples.lengths.tolist()
        return lengths
    return [len(example.input_ids) for example in examples]


def supervised_of(examples: Sequence[Example]) -> list[int]:
    """The learned tokens of each example."""
    if isinstance(examples, EncodedRows):
        supervised: list[int] = examples.supervised.tolist()
        return supervised
    return [example.supervised for example in examples]


def to_batch(encoded: Encoded, rows: Sequence[int]) -> pa.RecordBatch:
    """The examples as a batch of the table; `rows` are the places of their rows."""
    examples = encoded.examples
    columns: dict[str, list[Any]] = {field.name: [getattr(e, field.name) for e in examples] for field in _PLAIN}
    columns |= {
        "input_ids": [np.array(example.input_ids, np.int32) for example in examples],
        "learned": [_learned(example) for example in examples],
        "supervised": [example.supervised for example in examples],
        "row": list(rows),
    }
    return pa.record_batch([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


def summarize(encoded: Encoded, **more: list[str]) -> Summary:
    """What is known of encoded rows beside their examples."""
    names = [field.name for field in dataclasses.fields(Encoded) if field.name != "examples"]
    return {name: getattr(encoded, name) for name in names} | more


def add_summary(total: Summary, more: Summary) -> None:
    """Add what is known of the rows that follow: lists and numbers add up, of texts the first one stays."""
    for name, value in more.items():
        if isinstance(value, list):
            total.setdefault(name, []).extend(value)
        else:
            total[name] = (total.get(name) or value) if isinstance(value, str) else total.get(name, 0) + value


def notes_of(summary: Summary) -> Encoded:
    """What is known of encoded rows, without their examples."""
    names = {field.name for field in dataclasses.fields(Encoded)}
    return Encoded(**{name: value for name, value in summary.items() if name in names})


def with_summary(batch: pa.RecordBatch, summary: Summary) -> pa.Table:
    """A table of one batch that carries a summary in its metadata."""
    return pa.Table.from_batches([batch]).replace_schema_metadata({"summary": json.dumps(summary)})


def summary_of(table: pa.Table) -> Summary:
    """The summary in a table's metadata."""
    summary: Summary = json.loads(table.schema.metadata[b"summary"])
    return summary


def _learned(example: Example) -> Tokens:
    """Starts and ends of what is learned; raises ValueError for a label that is not its token."""
    ids, labels = np.array(example.input_ids, np.int32), np.array(example.labels, np.int32)
    mask = labels != IGNORED
    if not np.array_equal(ids[mask], labels[mask]):
        raise ValueError(f"{example.where}: a label is not the token at its place")
    return np.flatnonzero(np.diff(mask, prepend=False, append=False)).astype(np.int32)


def _parts(chunk: pa.ListArray) -> tuple[Tokens, Tokens]:
    """The offsets and values of a list column's chunk, as they lie in its buffers."""
    return chunk.offsets.to_numpy(), chunk.values.to_numpy()


def _starts_at_zero(offsets: Tokens, values: Tokens) -> npt.NDArray[np.bool_]:
    """Whether the first span of each example, of those that have one, starts at its first token."""
    padded = np.append(values, 1)
    return (np.diff(offsets) > 0) & (padded[np.minimum(offsets[:-1], len(values))] == 0)


def places_of_rows(wheres: Sequence[str], encoded: Encoded) -> Iterator[int]:
    """The place of each example's row among rows with these places in files."""
    places = {where: place for place, where in enumerate(wheres)}
    return (places[example.where] for example in encoded.examples)
