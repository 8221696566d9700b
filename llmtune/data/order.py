"""The order of the training rows: a function of seed and epoch alone, so that resuming and ranks agree on it."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

LARGEST = 50


def order(lengths: Sequence[int], batch: int, seed: int, epoch: int, grouped: bool) -> list[int]:
    """All rows in a random order; `grouped` puts rows of like length (tokens) into the same optimizer batch.

    Pools of up to 50 batches are drawn at random and sorted, as transformers does; then whole batches are shuffled,
    so that no step knows the length of the next. A last batch that is not full stays last.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    rows = torch.randperm(len(lengths), generator=generator).tolist()
    if not grouped:
        return rows
    pool = batch * max(1, min(LARGEST, len(rows) // (4 * batch)))
    whole = len(rows) // batch * batch
    batches = []
    for start in range(0, whole, pool):
        drawn = sorted(rows[start : min(start + pool, whole)], key=lengths.__getitem__)
        batches += [drawn[at : at + batch] for at in range(0, len(drawn), batch)]
    shuffled = [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
    return [row for group in [*shuffled, rows[whole:]] for row in group]


class Ordered(Sampler[int]):
    """The rows of one epoch after another, in `order`."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, grouped: bool) -> None:
        self._lengths, self._batch, self._seed, self._grouped = lengths, batch, seed, grouped
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is iterated next; counts from 0."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(order(self._lengths, self._batch, self._seed, self._epoch, self._grouped))

    def __len__(self) -> int:
        return len(self._lengths)
