"""Causal attention over long rows on CPUs, a block of queries at a time: no work on keys that no query of it sees."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch

from llmtune.kernels.context import Context
from llmtune.kernels.cpu.blocks import QUERIES, Row
from llmtune.kernels.rows import JoinedRows
from llmtune.kernels.varlen import Heads

STACKED = 1536
"""The most queries of all heads that are computed at once; with more, their scores would leave the cache."""
KEPT = 512
"""The longest row, in tokens, whose weights are kept for the backward pass; those of longer ones are computed again."""


class Span(NamedTuple):
    """A row: the tokens from `start` to `end` in an element of the batch."""

    element: int
    start: int
    end: int


class _BlockContext(Context):
    spans: Sequence[Span]
    scale: float
    window: int | None


class BlockAttention(torch.autograd.Function):
    """Causal attention with scores and softmax in fp32, each row by itself."""

    @staticmethod
    def forward(
        ctx: _BlockContext,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spans: Sequence[Span],
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Outputs (B, T, H, V) of queries (B, H, T, D), keys (B, K, T, D) and values (B, K, T, V); 0 beside rows."""
        ctx.spans, ctx.scale, ctx.window = spans, scale, window
        trains = any(ctx.needs_input_grad)
        out = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        kept: list[torch.Tensor] = []
        with _onednn(query.dtype):
            for part in _parts(spans, query, key, value, out.transpose(1, 2)):
                row = Row(cast(Heads, part[:3]), scale, window)
                _attend(row, part[3], kept if trains and row.tokens <= KEPT else None)
        ctx.save_for_backward(query, key, value, *kept)
        return out

    @staticmethod
    def backward(ctx: _BlockContext, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, *kept = ctx.saved_tensors
        results = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        weights = iter(kept)
        with _onednn(query.dtype):
            for part in _parts(ctx.spans, query, key, value, gradients[0].transpose(1, 2), *results):
                row = Row(cast(Heads, part[:3]), ctx.scale, ctx.window)
                _differentiate(row, part[3], cast(Heads, part[4:]), weights if row.tokens <= KEPT else None)
        return *results, None, None, None


def _attend(row: Row, out: torch.Tensor, kept: list[torch.Tensor] | None) -> None:
    """Write a row's outputs (H, T, V), and add the weights of its blocks to those that are kept."""
    scratch = row.scratch()
    for block in row.blocks:
        stack = row.stack(row.query, block)
        weights = row.weigh(stack, block, row.room(scratch, stack, block))
        low = weights.to(row.query.dtype, copy=kept is not None)
        row.place(torch.bmm(low, row.value[:, block.keys]), block, out)
        if kept is not None:
            kept.append(low)


def _differentiate(row: Row, of_out: torch.Tensor, results: Heads, kept: Iterator[torch.Tensor] | None) -> None:
    """Write the gradients of a row's heads into `results`, given that of its outputs (H, T, V)."""
    of_query, of_key, of_value = results
    of_out, wide_value = row.pad(of_out), row.value.to(row.wide)
    sum_key, sum_value = torch.zeros_like(row.wide_key), torch.zeros_like(wide_value)
    again, for_scores = row.scratch(), row.scratch()
    for block in row.blocks:
        stack, of_stack = row.stack(row.query, block), row.stack(of_out, block)
        weights = row.weigh(stack, block, row.room(again, stack, block)) if kept is None else next(kept)
        low, weights = weights.to(row.query.dtype), weights.to(row.wide)
        sum_value[:, block.keys] += torch.bmm(low.transpose(1, 2), of_stack)
        of_weights = row.room(for_scores, stack, block)
        torch.bmm(of_stack.to(row.wide), wide_value[:, block.keys].transpose(1, 2), out=of_weights)
        torch._softmax_backward_data(of_weights, weights, -1, row.wide, grad_input=of_weights)
        of_scores = of_weights.to(row.query.dtype)
        row.place(torch.baddbmm(stack, of_scores, row.key[:, block.keys], beta=0, alpha=row.scale), block, of_query)
        sum_key[:, block.keys] += torch.bmm(of_scores.transpose(1, 2), stack)
    of_key.copy_(sum_key.mul_(row.scale)[:, : row.tokens])
    of_value.copy_(sum_value[:, : row.tokens])


def _parts(
    spans: Sequence[Span], query: torch.Tensor, key: torch.Tensor, *more: torch.Tensor
) -> Iterator[list[torch.Tensor]]:
    """Each row, some of its heads at a time: views (H, T, D) of tensors (B, H, T, D), whose H may differ."""
    shared = key.shape[1]
    at_once = max(1, STACKED * shared // (query.shape[1] * QUERIES))
    for element, start, end in spans:
        for first in range(0, shared, at_once):
            part = []
            for tensor in (query, key, *more):
                group = tensor.shape[1] // shared
                part.append(tensor[element, first * group : (first + at_once) * group, start:end])
            yield part


@contextmanager
def _onednn(dtype: torch.dtype) -> Iterator[None]:
    """Let oneDNN multiply fp32 values that were bf16: it may round them to bf16, which changes none of them."""
    settings: Any = import_module("torch.backends").mkldnn.matmul
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "bf16" if dtype == torch.bfloat16 else before
        with torch.autocast("cpu", enabled=False):  # which would compute the scores in bf16
            yield
    finally:
        settings.fp32_precision = before


apply: Callable[..., torch.Tensor] = BlockAttention.apply


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of rows without padding: outputs (B, T, H, V) of (B, H, T, D), (B, K, T, D) and (B, K, T, V)."""
    spans = [Span(element, 0, query.shape[2]) for element in range(len(query))]
    return apply(query, key, value, spans, scale, None)


def attend_joined(heads: Heads, rows: JoinedRows, scale: float, window: int | None) -> torch.Tensor:
    """A kernel for joined rows, as `varlen` describes it."""
    spans = [Span(0, start, end) for start, end in pairwise(rows.starts)]
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in heads)
    return apply(query, key, value, spans, scale, window)[0]
