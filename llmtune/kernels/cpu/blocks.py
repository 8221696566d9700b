"""The blocks of a long row for attention on CPUs: queries, and the keys before them that some query of a block sees."""

from functools import lru_cache
from typing import NamedTuple

import torch

from llmtune.kernels.varlen import Heads

QUERIES = 128
"""The queries of a block."""
STEP = 64
"""Blocks end at multiples of this many tokens: oneDNN compiles a product anew for every shape."""


class Block(NamedTuple):
    """Queries from `start` to `end` of a row, and the keys from `first` to `end` that they see, but for a mask."""

    start: int
    end: int
    first: int
    window: int | None

    @property
    def queries(self) -> slice:
        """The block's queries among those of the row."""
        return slice(self.start, self.end)

    @property
    def keys(self) -> slice:
        """The block's keys among those of the row."""
        return slice(self.first, self.end)

    def mask(self) -> torch.Tensor:
        """What hides keys when it is added to scores: fp32 (Q, N) for the last N keys, where the first see no mask."""
        count = self.end - (self.start if self.window is None else self.first)
        return _mask(self.end - self.start, count, self.window)


@lru_cache(maxsize=16)
def _mask(queries: int, keys: int, window: int | None) -> torch.Tensor:
    """What hides keys from the last `queries` of as many tokens as there are keys: fp32 (Q, N) to add to scores."""
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(queries, keys).masked_fill_(hidden, torch.finfo(torch.float32).min)


def blocks(tokens: int, window: int | None) -> list[Block]:
    """The blocks of a row of so many tokens; a token sees itself and those before it, the last `window` of them."""
    padded = _padded(tokens)
    found = []
    for start in range(0, padded, QUERIES):
        end = min(start + QUERIES, padded)
        binds = window if window is not None and window < end else None
        first = 0 if binds is None else max(0, start - binds + 1) // STEP * STEP
        found.append(Block(start, end, first, binds))
    return found


def _padded(tokens: int) -> int:
    return -(-tokens // STEP) * STEP


class Row:
    """A row and some of its heads: queries (H, T, D), keys (K, T, D) and values (K, T, V), padded with zeros."""

    def __init__(self, heads: Heads, scale: float, window: int | None) -> None:
        self.tokens, self.scale = heads[0].shape[1], scale
        self.query, self.key, self.value = (self.pad(tensor) for tensor in heads)
        self.wide = torch.promote_types(self.query.dtype, torch.float32)
        self.wide_key = self.key.to(self.wide)
        self.blocks = blocks(self.tokens, window)
        self._scratch = len(self.query) * QUERIES * max(block.end - block.first for block in self.blocks)

    def pad(self, heads: torch.Tensor) -> torch.Tensor:
        """Heads (H, T, D) with zeros after the row."""
        out = heads.new_zeros(_padded(self.tokens), heads.shape[0], heads.shape[2])
        out[: self.tokens] = heads.transpose(0, 1)
        return out.transpose(0, 1)

    def stack(self, heads: torch.Tensor, block: Block) -> torch.Tensor:
        """The block's part of heads (H, T, D), those that share a key as one: (K, H / K x Q, D)."""
        return heads[:, block.queries].reshape(len(self.key), -1, heads.shape[2])

    def place(self, stacked: torch.Tensor, block: Block, out: torch.Tensor) -> None:
        """Write what `stack` gives into a block's part of heads (H, T, D), without the padding."""
        count = min(block.end, self.tokens) - block.start
        values = stacked.view(len(out), -1, stacked.shape[2])
        out[:, block.start : block.start + count] = values[:, :count]

    def scratch(self) -> torch.Tensor:
        """Memory for the scores of any block."""
        return torch.empty(self._scratch, dtype=self.wide)

    def room(self, scratch: torch.Tensor, stack: torch.Tensor, block: Block) -> torch.Tensor:
        """As much of it as a block's scores take: (K, H / K x Q, keys)."""
        shape = *stack.shape[:2], block.end - block.first
        return scratch[: stack.shape[0] * stack.shape[1] * shape[2]].view(shape)

    def weigh(self, stack: torch.Tensor, block: Block, scores: torch.Tensor) -> torch.Tensor:
        """The weights of a block's keys for its stacked queries, in the memory of `scores`."""
        seen = self.wide_key[:, block.keys].transpose(1, 2)
        torch.baddbmm(scores, stack.to(self.wide), seen, beta=0, alpha=self.scale, out=scores)
        mask = block.mask()
        scores.view(len(stack), -1, len(mask), scores.shape[2])[..., -mask.shape[1] :] += mask
        return torch.softmax(scores, -1, out=scores)
