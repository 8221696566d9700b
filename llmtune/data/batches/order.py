"""The order of the training rows, by seed and epoch alone, so that ranks and resumed runs agree; shares of others."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from llmtune.data.encoding.encode import IGNORED

POOL_BATCHES = 50


def order(lengths: Sequence[int], batch: int, seed: int, epoch: int, grouped: bool) -> list[int]:
    """Shuffle all rows of an epoch; `grouped` puts rows of similar length (tokens) into the same optimizer batch.

    Pools of up to 50 batches are drawn at random and sorted by length, as transformers does. Then full batches are
    shuffled, so that the length of one says nothing about the next. An incomplete last batch stays last.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    rows = torch.randperm(len(lengths), generator=generator).tolist()
    if not grouped:
        return rows
    pool = batch * max(1, min(POOL_BATCHES, len(rows) // (4 * batch)))
    full = len(rows) // batch * batch
    batches = []
    for start in range(0, full, pool):
        by_length = sorted(rows[start : min(start + pool, full)], key=lengths.__getitem__)
        batches += [by_length[at : at + batch] for at in range(0, len(by_length), batch)]
    shuffled = [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
    return [row for group in [*shuffled, rows[full:]] for row in group]


def share(rows: int, rank: int, world: int) -> list[int | None]:
    """The rows that one of `world` processes validates; None, which does not count, evens out their number.

    Every process has as many, since those that share a model run it together, and no row counts twice.
    """
    own: list[int | None] = list(range(rank, rows, world))
    return own + [None] * (math.ceil(rows / world) - len(own))


def shared_batches(
    rows: Sequence[dict[str, Any]], rank: int, world: int, size: int, collate: Callable[[list[dict[str, Any]]], Any]
) -> DataLoader[dict[str, Any]]:
    """A process's batches of its share of the rows, in order; what evens out their number has no label."""
    return DataLoader(_Share(rows, share(len(rows), rank, world)), batch_size=size, collate_fn=collate)


class _Share(Dataset[dict[str, Any]]):
    """The rows with these indices, each made when it is asked for; None is a row without labels."""

    def __init__(self, rows: Sequence[dict[str, Any]], indices: Sequence[int | None]) -> None:
        self._rows, self._indices = rows, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> dict[str, Any]:
        index = self._indices[place]
        if index is not None:
            return self._rows[index]
        first = self._rows[0]
        return first | {"labels": [IGNORED] * len(first["labels"])}


class EpochSampler(Sampler[int]):
    """Samples the rows of each epoch in `order`."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, grouped: bool) -> None:
        self._lengths, self._batch, self._seed, self._grouped = lengths, batch, seed, grouped
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0, that is iterated next."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(order(self._lengths, self._batch, self._seed, self._epoch, self._grouped))

    def __len__(self) -> int:
        return len(self._lengths)
