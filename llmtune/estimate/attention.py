"""Attention as fused kernels keep it for the backward pass: inputs, output and one number a row, never the scores."""

from collections.abc import Callable

import torch

from llmtune.kernels.context import Context

Attention = Callable[..., torch.Tensor]


class _Fused(torch.autograd.Function):
    """The shapes of an attention whose scores are computed again in its backward pass."""

    @staticmethod
    def forward(
        ctx: Context, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """An output (B, H, T, V) of query (B, H, T, D), key and value."""
        batch, heads, tokens, _ = query.shape
        # As kernels lay it out: joining the heads of a token, which comes next, copies nothing.
        out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, rows, *(() if mask is None else (mask,)))
        return out

    @staticmethod
    def backward(ctx: Context, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


_fused: Attention = _Fused.apply


def attend(
    function: Attention,
    kind: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: bool | float | None,
) -> torch.Tensor:
    """The output of scaled_dot_product_attention on a kind of device; `function` where that has no fused kernel."""
    learned = attn_mask is not None and attn_mask.requires_grad
    one_width = query.shape[-1] == key.shape[-1] == value.shape[-1]
    one_count = query.shape[1] == key.shape[1] or options.get("enable_gqa", False)
    fused = query.ndim == 4 and one_count and not learned
    if kind == "cpu":
        fused = fused and one_width and not dropout_p
    if not fused:
        return function(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)  # every call makes its own
    return _fused(query, key, value, attn_mask)
