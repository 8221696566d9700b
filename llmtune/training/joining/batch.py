"""A batch of padded rows, copies of one of them, and what a model is given of rows that are joined."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from llmtune.kernels.rows import Inputs, JoinedRows


class Batch(NamedTuple):
    """Rows (B, T), their lengths and places among cached outputs, and whether a mask keeps them apart if joined."""

    ids: torch.Tensor
    lengths: Sequence[int]
    stored: list[int] | None
    masked: bool

    def joined(self) -> JoinedRows:
        """How its rows are joined."""
        return JoinedRows(self.lengths, self.ids.shape[1], self.ids.device, self.masked)

    def copies(self, longest: int, most: int) -> "Batch":
        """Copies of its longest row, cut to `longest` tokens: so many that, joined, the last follows `most` tokens."""
        row = max(range(len(self.lengths)), key=lambda row: self.lengths[row])
        length = min(self.lengths[row], longest)
        count = -(-most // length) + 1
        ids = self.ids[row : row + 1, :length].expand(count, -1)
        return Batch(ids, [length] * count, [self.stored[row]] if self.stored else None, self.masked)


def model_inputs(ids: torch.Tensor, rows: JoinedRows) -> Inputs:
    """A model's inputs for rows (B, T) that are joined: ids and positions, which start anew at every row."""
    inputs = {"input_ids": rows.joined(ids), "position_ids": rows.positions()}
    if rows.masked:
        return inputs
    # Without a mask, transformers looks for rows in the positions, for which the host waits.
    return inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}
