"""Attention over short rows on CPUs, where the backward pass of torch's kernel takes several times as long."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

SHORT = 192
SDPA = "sdpa"


class JoinedRows:
    """Where the tokens of right-padded rows (B, T) stand when they are joined into one row without padding (1, N).

    The last place is a filler's: a row of its own that nothing else sees, which stands for all padding.
    """

    def __init__(self, real: torch.Tensor) -> None:
        """`real` (B, T) is true on tokens, false on padding."""
        self.shape = real.shape
        self.tokens = int(real.sum())
        self.length = self.tokens + 1
        self._real = real
        self._slots = functional.pad(real.flatten().nonzero().flatten(), (0, 1))
        self._places = (real.flatten().cumsum(0) - 1).view(real.shape).masked_fill_(~real, self.tokens)
        self._indices: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def places(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """The places in the joined row of tokens given by row and column."""
        return self._places[rows, columns]

    def joined(self, values: torch.Tensor) -> torch.Tensor:
        """Values (B, T, ...) as (1, N, ...); the filler repeats the first one."""
        return values.flatten(0, 1).index_select(0, self._slots)[None]

    def apart(self, values: torch.Tensor) -> torch.Tensor:
        """Values of heads (1, H, N, D) as (B, H, T, D); on padding stands what the filler has."""
        heads, width = values.shape[1], values.shape[3]
        flat = values.transpose(1, 2).reshape(-1, width)
        there, _ = self._index(heads)
        return flat.index_select(0, there).view(self.shape[0], heads, self.shape[1], width)

    def together(self, values: torch.Tensor) -> torch.Tensor:
        """Values of heads (B, H, T, D) as (1, N, H, D), zero on the filler."""
        heads, width = values.shape[1], values.shape[3]
        out = values.new_empty(self.length, heads, width)
        _, back = self._index(heads)
        torch.index_select(values.reshape(-1, width), 0, back, out=out[:-1].view(-1, width))
        out[-1] = 0
        return out[None]

    def mask(self, mask: torch.Tensor) -> torch.Tensor:
        """A mask (1, 1, N, N), true or 0 where a token is seen, as (B, 1, T, T); padding sees padding alone."""
        return mask[0, 0][self._places[:, :, None], self._places[:, None, :]][:, None]

    def _index(self, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where what stands at (B, H, T) is in (N, H), and the other way round for all but the filler."""
        if heads not in self._indices:
            head = torch.arange(heads)
            there = self._places[:, None] * heads + head[:, None]
            row, column = self._real.nonzero(as_tuple=True)
            back = (row[:, None] * heads + head) * self.shape[1] + column[:, None]
            self._indices[heads] = there.flatten(), back.flatten()
        return self._indices[heads]


class ShortAttention(torch.autograd.Function):
    """Scores and softmax in fp32, products with values in theirs; keeps the T x T weights, so T has to be small."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        scale: float,
        rows: JoinedRows | None,
    ) -> torch.Tensor:
        """Outputs (B, T, H, D) of queries (B, H, T, D), keys and values (B, K, T, D), and a mask to add (B, 1, T, T).

        H / K heads share keys and values: their queries stand under one another, so that nothing is repeated. All but
        the mask are of joined rows where `rows` says how: (1, N, H, D) of (1, H, N, D) and (1, K, N, D).
        """
        if rows:
            query, key, value = rows.apart(query), rows.apart(key), rows.apart(value)
        batch, heads, tokens, width = query.shape
        shared = key.shape[1]
        stacked = query.reshape(batch, shared, -1, width)
        scores = torch.matmul(stacked.float(), key.float().transpose(-1, -2)).mul_(scale)
        scores.view(batch, shared, heads // shared, tokens, tokens).add_(mask[:, :, None])
        weights = torch.softmax(scores, -1).to(query.dtype)
        ctx.save_for_backward(stacked, key, value, weights)
        ctx.scale, ctx.rows = scale, rows
        out = torch.matmul(weights, value).view(batch, heads, tokens, -1)
        return rows.together(out) if rows else out.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Gradients of query, key and value."""
        stacked, key, value, weights = ctx.saved_tensors
        batch, shared, rows, width = stacked.shape
        outer = gradients[0].transpose(1, 2)
        # Nothing that is scored sees the filler, so that its gradient is zero, as it has to be on padding.
        given = (ctx.rows.apart(outer) if ctx.rows else outer).reshape(batch, shared, rows, -1)
        of_value = torch.matmul(weights.transpose(-1, -2), given)
        of_weights = torch.matmul(given.float(), value.float().transpose(-1, -2))
        of_scores = torch._softmax_backward_data(of_weights, weights.float(), -1, torch.float32)
        of_scores = of_scores.mul_(ctx.scale).to(stacked.dtype)
        of_query = torch.matmul(of_scores, key).view(batch, -1, key.shape[2], width)
        of_key = torch.matmul(of_scores.transpose(-1, -2), stacked)
        if ctx.rows:
            of_query, of_key, of_value = (ctx.rows.together(of).transpose(1, 2) for of in (of_query, of_key, of_value))
        return of_query, of_key, of_value, None, None, None


_attend: Any = ShortAttention.apply


class AttentionRouter:
    """Stands in for transformers' "sdpa" and takes what is short, on a CPU; everything else goes on to it."""

    def __init__(self, default: Any) -> None:
        self._default = default
        self._mask: torch.Tensor | None = None
        self._added = torch.empty(0)
        self.rows: JoinedRows | None = None

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **named: Any,
    ) -> tuple[torch.Tensor, None]:
        if torch.is_autocast_enabled(query.device.type):
            # As autocast does with the default: rotary embeddings may have left queries and keys in fp32.
            precision = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(precision), key.to(precision), value.to(precision)
        plain = dropout == 0 and all(named.get(name) is None for name in ("softcap", "position_bias", "s_aux"))
        rows = self.rows if self.rows and query.shape[::2] == (1, self.rows.length) else None
        if not (plain and attention_mask is not None and _short(query, key, value, attention_mask, rows)):
            more = {"dropout": dropout, "scaling": scaling, **named}
            given: tuple[torch.Tensor, None] = self._default(module, query, key, value, attention_mask, **more)
            return given
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        added = self._to_add(attention_mask, rows)
        with torch.autocast(query.device.type, enabled=False):  # which would have the scores in bf16
            return _attend(query, key, value, added, scale, rows), None

    def _to_add(self, mask: torch.Tensor, rows: JoinedRows | None) -> torch.Tensor:
        """The mask as fp32 (B, 1, T, T) to add; blocks of one kind are given the same one."""
        if mask is not self._mask:
            wanted = rows.mask(mask) if rows else mask
            least = torch.finfo(torch.float32).min
            boolean = wanted.dtype == torch.bool
            self._added = torch.zeros(wanted.shape).masked_fill_(~wanted, least) if boolean else wanted.float()
            self._mask = mask
        return self._added


def _short(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, rows: JoinedRows | None
) -> bool:
    known = query.dtype in (torch.bfloat16, torch.float32) and query.dtype == key.dtype == value.dtype
    fits = query.shape[1] % key.shape[1] == 0 and mask.shape[1:] == (1, query.shape[2], key.shape[2])
    longest = rows.shape[1] if rows else query.shape[2]
    return known and fits and query.device.type == "cpu" and longest <= SHORT


@contextmanager
def short_row_attention() -> Iterator[AttentionRouter]:
    """Let models whose attention is transformers' "sdpa" take `ShortAttention` where it applies."""
    # Under a name of its own, models that compare their configuration with "sdpa" would compute otherwise.
    default = AttentionInterface()[SDPA]
    router = AttentionRouter(default)
    AttentionInterface.register(SDPA, router)
    try:
        yield router
    finally:
        AttentionInterface.register(SDPA, default)
