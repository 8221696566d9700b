"""The batches of a training: a process's rows of an optimizer step, collated pass by pass."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, TypedDict

from torch.utils.data import Dataset, Sampler

from llmtune.data.batches.order import EpochSampler
from llmtune.data.batches.passes import PassLimits, split
from llmtune.data.batches.rows import Row, row_lengths, row_targets
from llmtune.data.encoding.encode import IGNORED

Collated = dict[str, Any]
"""A pass's rows as the collator gives them."""
Collate = Callable[[list[Row]], Collated]


class Batch(TypedDict):
    """What a process does between two updates of the weights."""

    passes: list[Collated]
    """The collated rows of each forward and backward pass."""
    supervised: int
    """The supervised tokens of all processes' rows."""
    idle: bool
    """Whether the last pass is a row without labels, which keeps pace with processes that have one row more."""


@dataclass(frozen=True)
class Pass:
    """The rows of one pass of one process, and the supervised tokens of all processes' rows."""

    rows: list[int]
    supervised: int


class StepSampler(Sampler[list[Pass]]):
    """Samples a process's batches of passes, in the order of an EpochSampler.

    Each process knows what the others do, so none has to ask: they agree on the number of passes and of tokens.
    """

    def __init__(
        self, rows: Sequence[Row], sampler: EpochSampler, limits: PassLimits, share: int, rank: int, world: int
    ) -> None:
        """A batch is `share` rows of each of `world` processes, of which this is number `rank`."""
        self.sampler = sampler
        self._lengths = row_lengths(rows)
        self._supervised = row_targets(rows)
        self._limits, self._rows, self._rank, self._world = limits, share * world, rank, world

    def __iter__(self) -> Iterator[list[Pass]]:
        epoch = list(self.sampler)
        for start in range(0, len(epoch), self._rows):
            yield self._passes(epoch[start : start + self._rows])

    def _passes(self, rows: list[int]) -> list[Pass]:
        shares = split([self._lengths[row] for row in rows], self._limits, self._world)
        return [
            Pass(
                [rows[place] for place in of_pass[self._rank]],
                sum(self._supervised[rows[place]] for of_process in of_pass for place in of_process),
            )
            for of_pass in shares
        ]

    def __len__(self) -> int:
        return ceil(len(self._lengths) / self._rows)


class PassRows(Dataset[tuple[Collated, Pass]]):
    """The rows of a training set, collated for one pass."""

    def __init__(self, rows: Sequence[Row], collate: Collate) -> None:
        self._rows, self._collate = rows, collate
        self._unlabelled = rows[0] | {"labels": [IGNORED] * len(rows[0]["labels"])}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, wanted: Pass) -> tuple[Collated, Pass]:
        rows = [self._rows[row] for row in wanted.rows] or [self._unlabelled]
        return self._collate(rows), wanted


def join_passes(passes: list[tuple[Collated, Pass]]) -> Batch:
    """A batch of collated passes."""
    return {
        "passes": [tensors for tensors, _ in passes],
        "supervised": sum(each.supervised for _, each in passes),
        "idle": not passes[-1][1].rows,
    }
