"""Rows joined into one without padding: where each token goes, and the way back."""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch.nn import functional

Inputs = dict[str, torch.Tensor]
"""What a model is given, by name."""


class JoinedRows:
    """Maps right-padded rows (B, T) to one row (1, N) that holds all their tokens and no padding, and back.

    The last of the N positions is a filler: a row of one token that stands for all padding and that no token sees.
    """

    def __init__(
        self, lengths: Sequence[int], width: int, device: torch.device | None = None, masked: bool = False
    ) -> None:
        """Rows of these `lengths` in tokens, padded to `width`, on a device; computed on the CPU and copied there."""
        self.shape = torch.Size((len(lengths), width))
        self.lengths = [*lengths, 1]
        self.longest = max(lengths)
        self.tokens = sum(lengths)
        self.length = self.tokens + 1
        self.device = torch.device("cpu") if device is None else device
        self.masked = masked
        """Whether a mask keeps them apart, in place of a kernel."""
        self._real = torch.arange(width) < torch.tensor([*lengths])[:, None]
        self.starts = [0, *accumulate(self.lengths)]
        self._starts = torch.tensor(self.starts)
        sources = functional.pad(self._real.flatten().nonzero().flatten(), (0, 1))
        copied = _copied(torch.cat([sources, self._starts]), self.device)
        self._sources, self._device_starts = copied[: self.length], copied[self.length :]
        self.boundaries = self._device_starts.int()
        """Where each row starts in the joined one, and its end: int32 (B + 2), with the filler as a row."""
        self._head_maps: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def places(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Positions in the joined row of the tokens at (row, column), on the device of `rows`."""
        starts = self._starts if rows.device.type == "cpu" else self._device_starts
        return starts[rows] + columns

    def positions(self) -> torch.Tensor:
        """Positions (1, N) within each row; they start anew at every row and at the filler."""
        return (self._sources % self.shape[1])[None]

    def joined(self, values: torch.Tensor) -> torch.Tensor:
        """Values (B, T, ...) as (1, N, ...); the filler repeats the first one."""
        return values.flatten(0, 1).index_select(0, self._sources)[None]

    def padded(self, values: torch.Tensor) -> torch.Tensor:
        """Joined values (1, N, ...) as padded rows (B, T, ...); padding takes the filler's value."""
        return values[0][self._places.to(values.device)]

    def split_heads(self, values: torch.Tensor) -> torch.Tensor:
        """Joined values of heads (1, H, N, D) as padded rows (B, H, T, D); padding takes the filler's value."""
        heads, width = values.shape[1], values.shape[3]
        flat = values.transpose(1, 2).reshape(-1, width)
        to_padded, _ = self._head_map(heads)
        return flat.index_select(0, to_padded).view(self.shape[0], heads, self.shape[1], width)

    def join_heads(self, values: torch.Tensor) -> torch.Tensor:
        """Padded values of heads (B, H, T, D) as one row (1, N, H, D), zero on the filler."""
        heads, width = values.shape[1], values.shape[3]
        out = values.new_empty(self.length, heads, width)
        _, to_joined = self._head_map(heads)
        torch.index_select(values.reshape(-1, width), 0, to_joined, out=out[:-1].view(-1, width))
        out[-1] = 0
        return out[None]

    def split_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """A mask (1, 1, N, N), true or 0 where a token is seen, as (B, 1, T, T); padding sees only padding."""
        return mask[0, 0][self._places[:, :, None], self._places[:, None, :]][:, None]

    @cached_property
    def _places(self) -> torch.Tensor:
        """Positions (B, T) in the joined row; padding is at the filler."""
        return (self._real.flatten().cumsum(0) - 1).view(self.shape).masked_fill_(~self._real, self.tokens)

    def _head_map(self, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Flat indices into (N, H) for all of (B, H, T), and into (B, H, T) for all of (N, H) but the filler."""
        if heads not in self._head_maps:
            head = torch.arange(heads)
            to_padded = self._places[:, None] * heads + head[:, None]
            row, column = self._real.nonzero(as_tuple=True)
            to_joined = (row[:, None] * heads + head) * self.shape[1] + column[:, None]
            self._head_maps[heads] = to_padded.flatten(), to_joined.flatten()
        return self._head_maps[heads]


def _copied(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Values on a device; the host does not wait for the copy."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)
