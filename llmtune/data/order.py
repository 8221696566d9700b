"""The order of the training rows; it depends on seed and epoch alone, so that ranks and resumed runs agree."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

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
