"""Attention over rows that are joined into one: kernels of GPUs for rows of various lengths, and one row at a time."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch.nn import functional

from llmtune.kernels.rows import JoinedRows

Heads: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries (N, H, D), and keys and values (N, K, D) of which H / K heads share one, of N tokens."""
Kernel: TypeAlias = Callable[[Heads, JoinedRows, float, int | None], torch.Tensor]
"""Outputs (N, H, D) for heads, rows, a scale, and a window in tokens or None.

Each token sees itself and the tokens before it in its row, the last `window` of them where there is one.
"""
LONGEST = 256
"""The tokens of a row with which a kernel is compared."""
TOLERANCE = 2**-6
"""How far a kernel may be from attention in fp32, relative in the norm: outputs and gradients in bf16 or fp16."""


@cache
def kernel() -> Kernel | None:
    """The kernel of this process: torch's own, flash_attn's where torch has none, or None."""
    return _torch_kernel() or _flash_attn_kernel()


def _torch_kernel() -> Kernel | None:
    if find_spec("torch.nn.attention.varlen") is None:
        return None
    attention: Callable[..., torch.Tensor] = import_module("torch.nn.attention.varlen").varlen_attn
    known = signature(attention).parameters
    if "scale" not in known:
        return None

    def torch_varlen(heads: Heads, rows: JoinedRows, scale: float, window: int | None) -> torch.Tensor:
        # The first versions had no window, and took several queries to a key without being told.
        options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
        if "window_size" in known:
            options["window_size"] = (-1 if window is None else window - 1, 0)
        elif window is None:
            options["is_causal"] = True
        else:
            raise NotImplementedError("this torch has no window for rows of various lengths")
        starts, longest = rows.boundaries, rows.longest
        return attention(*heads, starts, starts, longest, longest, scale=scale, **options)

    return torch_varlen


def _flash_attn_kernel() -> Kernel | None:
    if find_spec("flash_attn") is None:
        return None
    attention: Callable[..., torch.Tensor] = import_module("flash_attn").flash_attn_varlen_func

    def flash_attn(heads: Heads, rows: JoinedRows, scale: float, window: int | None) -> torch.Tensor:
        starts, longest = rows.boundaries, rows.longest
        options = {"causal": True, "window_size": (-1 if window is None else window - 1, 0)}
        return attention(*heads, starts, starts, longest, longest, softmax_scale=scale, **options)

    return flash_attn


def row_by_row(heads: Heads, rows: JoinedRows, scale: float, window: int | None) -> torch.Tensor:
    """A `Kernel` that takes one row after another through torch's attention: slow, for comparison."""
    outputs = []
    for start, end in pairwise(rows.starts):
        query, key, value = (tensor[start:end].transpose(0, 1)[None] for tensor in heads)
        seen = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).tril_()
        if window is not None:
            seen = seen.triu_(1 - window)
        out = functional.scaled_dot_product_attention(query, key, value, seen, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def is_right(kernel: Kernel, heads: Heads, rows: JoinedRows, scale: float, window: int | None) -> bool:
    """Whether a kernel gives the outputs and gradients, for the start of each row, that it has alone in fp32."""
    lengths = [min(length, LONGEST) for length in rows.lengths[:-1]]
    device = heads[0].device
    short = JoinedRows(lengths, max(lengths), device)
    starts = zip(rows.starts, short.lengths, strict=False)
    taken = torch.cat([torch.arange(start, start + length) for start, length in starts]).to(device)
    results = []
    for attend, dtype in ((kernel, heads[0].dtype), (row_by_row, torch.float32)):
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            query, key, value = (tensor.detach()[taken].to(dtype).requires_grad_() for tensor in heads)
            out = attend((query, key, value), short, scale, window)
            of_out = torch.linspace(-1, 1, out.numel(), device=device).view_as(out).to(out.dtype)
            results.append([out.detach(), *torch.autograd.grad(out, (query, key, value), of_out)])
    pairs = zip(*results, strict=True)
    return all(bool((ours.float() - exact).norm() <= TOLERANCE * exact.norm()) for ours, exact in pairs)
