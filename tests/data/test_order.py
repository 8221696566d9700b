"""Shares of rows: each row in one process, and as many rows in every process."""

import pytest

from llmtune.data.batches.order import share


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 2, 3, 81])
def test_every_row_is_in_one_share_and_shares_are_equally_long(rows: int, world: int) -> None:
    shares = [share(rows, rank, world) for rank in range(world)]
    assert sorted(index for own in shares for index in own if index is not None) == list(range(rows))
    assert len({len(own) for own in shares}) == 1
    assert len(shares[0]) * world - rows < world
