"""Attention over rows on CPUs: the backward pass of torch's own kernel takes several times as long there."""

from collections.abc import Callable, Sequence

import torch

from llmtune.kernels import device
from llmtune.kernels.context import Context
from llmtune.kernels.rows import JoinedRows

SHORT = 192
"""The longest row, in tokens, that `ShortAttention` takes."""
LONG = 64
"""The shortest row, in tokens, that `BlockAttention` takes where rows have no padding."""
MASKED = 4096
"""The most tokens of rows that a mask keeps apart: it takes the square of them in memory."""


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


attend: Callable[..., torch.Tensor] = ShortAttention.apply


def is_short(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, rows: JoinedRows | None
) -> bool:
    """Whether `ShortAttention` computes for these tensors, with a mask whose shape it knows, and is the faster way."""
    fits = not mask.requires_grad and mask.shape[1:] == (1, query.shape[2], key.shape[2])  # no gradient is computed
    longest = rows.shape[1] if rows else query.shape[2]
    return fits and longest <= SHORT and _is_known(query, key, value)


def is_long(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `BlockAttention` computes for these tensors of rows without padding or a mask, and is the faster way."""
    return LONG <= query.shape[2] == key.shape[2] and _is_known(query, key, value)


def is_masked(lengths: Sequence[int], width: int, where: torch.device) -> bool:
    """Whether a mask keeps joined rows of these lengths apart, as few short ones on CPUs: padded to a width."""
    return device.on_cpu(where) and width <= SHORT and sum(lengths) <= MASKED


def _is_known(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    known = query.dtype in (torch.bfloat16, torch.float32) and query.dtype == key.dtype == value.dtype
    return known and query.shape[1] % key.shape[1] == 0 and device.on_cpu(query.device)
