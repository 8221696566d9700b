"""Examples as the trainer's rows, made one by one: any number of them takes no memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmtune.data.example import IGNORED, Example
from llmtune.data.lazy import LazySequence
from llmtune.data.store.encoded import EncodedRows, lengths_of

Row = dict[str, Any]
"""`input_ids` and `labels` of equal length, and maybe an `index`."""


class ExampleRows(LazySequence[Row]):
    """Rows of input_ids and labels, as arrays, and index, which counts from `first`."""

    def __init__(self, examples: Sequence[Example], first: int = 0) -> None:
        self._examples, self._first = examples, first

    def __len__(self) -> int:
        return len(self._examples)

    def item(self, place: int) -> Row:
        """Make the row at a place."""
        if isinstance(self._examples, EncodedRows):
            ids, labels = self._examples.tokens(place), self._examples.labels(place)
        else:
            example = self._examples[place]
            ids, labels = np.array(example.input_ids), np.array(example.labels)
        return {"input_ids": ids.astype(np.int64), "labels": labels.astype(np.int64), "index": self._first + place}

    @property
    def lengths(self) -> list[int]:
        """The tokens of each row."""
        return lengths_of(self._examples)

    @property
    def targets(self) -> list[int]:
        """The tokens of each row that are predicted and learned: the first is not predicted."""
        if isinstance(self._examples, EncodedRows):
            targets: list[int] = self._examples.targets.tolist()
            return targets
        return [_targets(example.labels) for example in self._examples]


def row_lengths(rows: Sequence[Row]) -> list[int]:
    """The tokens of each row."""
    return rows.lengths if isinstance(rows, ExampleRows) else [len(row["input_ids"]) for row in rows]


def row_targets(rows: Sequence[Row]) -> list[int]:
    """The tokens of each row that are predicted and learned."""
    return rows.targets if isinstance(rows, ExampleRows) else [_targets(row["labels"]) for row in rows]


def _targets(labels: Sequence[int]) -> int:
    return int((np.asarray(labels)[1:] != IGNORED).sum())
