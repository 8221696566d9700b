"""Attention over short rows on CPUs: the backward pass of torch's own kernel takes several times as long there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature

import torch
from torch.nn import functional
from transformers import AttentionInterface

from llmtune.kernels.context import Context

SHORT = 192
"""The longest row, in tokens, that `ShortAttention` takes."""
SDPA = "sdpa"
Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""An attention function of transformers: outputs, and attention weights or None."""


class JoinedRows:
    """Maps right-padded rows (B, T) to one row (1, N) that holds all their tokens and no padding, and back.

    The last of the N positions is a filler: a row of one token that stands for all padding and that no token sees.
    """

    def __init__(self, real: torch.Tensor) -> None:
        """`real` (B, T) is true on tokens, false on padding."""
        self.shape = real.shape
        self.tokens = int(real.sum())
        self.length = self.tokens + 1
        self._real = real
        self._sources = functional.pad(real.flatten().nonzero().flatten(), (0, 1))
        self._places = (real.flatten().cumsum(0) - 1).view(real.shape).masked_fill_(~real, self.tokens)
        self._head_maps: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def places(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Positions in the joined row of the tokens at (row, column)."""
        return self._places[rows, columns]

    def joined(self, values: torch.Tensor) -> torch.Tensor:
        """Values (B, T, ...) as (1, N, ...); the filler repeats the first one."""
        return values.flatten(0, 1).index_select(0, self._sources)[None]

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

    def _head_map(self, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Flat indices into (N, H) for all of (B, H, T), and into (B, H, T) for all of (N, H) but the filler."""
        if heads not in self._head_maps:
            head = torch.arange(heads)
            to_padded = self._places[:, None] * heads + head[:, None]
            row, column = self._real.nonzero(as_tuple=True)
            to_joined = (row[:, None] * heads + head) * self.shape[1] + column[:, None]
            self._head_maps[heads] = to_padded.flatten(), to_joined.flatten()
        return self._head_maps[heads]


class _AttentionContext(Context):
    scale: float
    rows: JoinedRows | None


class ShortAttention(torch.autograd.Function):
    """Attention with scores and softmax in fp32; saves the T x T weights for the backward pass, so T must be small."""

    @staticmethod
    def forward(
        ctx: _AttentionContext,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        scale: float,
        rows: JoinedRows | None,
    ) -> torch.Tensor:
        """Outputs (B, T, H, D) of queries (B, H, T, D), keys and values (B, K, T, D), and a mask to add (B, 1, T, T).

        H / K heads share a key and a value: their queries are stacked, so that no key is repeated. With `rows`, all
        but the mask are of joined rows: outputs (1, N, H, D) of (1, H, N, D) and (1, K, N, D).
        """
        if rows:
            query, key, value = rows.split_heads(query), rows.split_heads(key), rows.split_heads(value)
        batch, heads, tokens, width = query.shape
        shared = key.shape[1]
        stacked = query.reshape(batch, shared, -1, width)
        scores = torch.matmul(stacked.float(), key.float().transpose(-1, -2)).mul_(scale)
        scores.view(batch, shared, heads // shared, tokens, tokens).add_(mask[:, :, None])
        weights = torch.softmax(scores, -1).to(query.dtype)
        ctx.save_for_backward(stacked, key, value, weights)
        ctx.scale, ctx.rows = scale, rows
        out = torch.matmul(weights, value).view(batch, heads, tokens, -1)
        return rows.join_heads(out) if rows else out.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: _AttentionContext, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key and value."""
        stacked, key, value, weights = ctx.saved_tensors
        batch, shared, stack, width = stacked.shape
        rows = ctx.rows
        outer = gradients[0].transpose(1, 2)
        # No token that has a loss sees the filler, so its gradient is zero, as it must be on padding.
        of_out = (rows.split_heads(outer) if rows else outer).reshape(batch, shared, stack, -1)
        of_value = torch.matmul(weights.transpose(-1, -2), of_out)
        of_weights = torch.matmul(of_out.float(), value.float().transpose(-1, -2))
        of_scores = torch._softmax_backward_data(of_weights, weights.float(), -1, torch.float32)
        of_scores = of_scores.mul_(ctx.scale).to(stacked.dtype)
        of_query = torch.matmul(of_scores, key).view(batch, -1, key.shape[2], width)
        of_key = torch.matmul(of_scores.transpose(-1, -2), stacked)
        if rows:
            of_query, of_key, of_value = (rows.join_heads(of).transpose(1, 2) for of in (of_query, of_key, of_value))
        return of_query, of_key, of_value, None, None, None


_attend: Callable[..., torch.Tensor] = ShortAttention.apply


class AttentionRouter:
    """Replaces transformers' "sdpa": sends short rows on a CPU to `ShortAttention` and all else to the default."""

    def __init__(self, default: Attention) -> None:
        self._default = default
        # What the default knows beside its first five arguments changes its results; `is_causal` not beside a mask.
        self._changing = {"softcap", "s_aux", *list(signature(default).parameters)[5:]}
        self._changing -= {"dropout", "scaling", "is_causal", "kwargs"}
        self._last_mask: torch.Tensor | None = None
        self._last_bias = torch.empty(0)
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
        **options: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if torch.is_autocast_enabled(query.device.type):
            # As autocast does with the default: rotary embeddings may have left queries and keys in fp32.
            precision = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(precision), key.to(precision), value.to(precision)
        plain = dropout == 0 and all(options.get(name) is None for name in self._changing)
        rows = self.rows if self.rows and query.shape[::2] == (1, self.rows.length) else None
        if not (plain and attention_mask is not None and _is_short(query, key, value, attention_mask, rows)):
            options = {"dropout": dropout, "scaling": scaling, **options}
            return self._default(module, query, key, value, attention_mask, **options)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        bias = self._bias(attention_mask, rows)
        with torch.autocast(query.device.type, enabled=False):  # which would compute the scores in bf16
            return _attend(query, key, value, bias, scale, rows), None

    def _bias(self, mask: torch.Tensor, rows: JoinedRows | None) -> torch.Tensor:
        """The mask as fp32 (B, 1, T, T) to add to scores; made once for blocks that are given the same mask."""
        if mask is not self._last_mask:
            padded = rows.split_mask(mask) if rows else mask
            least = torch.finfo(torch.float32).min
            boolean = padded.dtype == torch.bool
            self._last_bias = torch.zeros(padded.shape).masked_fill_(~padded, least) if boolean else padded.float()
            self._last_mask = mask
        return self._last_bias


def _is_short(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, rows: JoinedRows | None
) -> bool:
    known = query.dtype in (torch.bfloat16, torch.float32) and query.dtype == key.dtype == value.dtype
    known = known and not mask.requires_grad  # no gradient is computed for it
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
