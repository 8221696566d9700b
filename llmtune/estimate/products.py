"""Arithmetic of matrix products, counted from shapes alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llmtune.kernels.context import Context

_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})


@dataclass
class Products:
    """Operations (two a multiplication and addition) of the products of a forward pass and of its backward pass."""

    forward: float = 0.0
    backward: float = 0.0

    def count(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add a call of a function of torch, where it is a product."""
        operands = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        if name == "scaled_dot_product_attention":
            self._count_attention(*operands[:3])
        elif name in ("addmm", "baddbmm") and len(operands) > 2:
            self._add(operands[1], operands[2], operands[2].shape[-1])
        elif name == "linear" and len(operands) > 1:
            self._add(operands[0], operands[1], operands[1].shape[0])
        elif name in ("matmul", "mm", "bmm", "grouped_mm", "_grouped_mm") and len(operands) > 1:
            self._count_product(operands[0], operands[1])
        elif name in _CONVOLUTIONS:
            self._add(operands[0], operands[1], operands[1].numel() / operands[0].shape[1])

    def _count_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        width = right.shape[-1] if right.ndim > 1 else 1
        if left.ndim < 2 or left.numel() == 0:
            return
        self._add(left, right, width)

    def _count_attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """A causal attention computes half of the scores; its backward pass takes two and a half times as much."""
        rows = query.numel() / query.shape[-1]
        forward = rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        self.forward += forward
        self.backward += 2.5 * forward * any(one.requires_grad for one in (query, key, value))

    def _add(self, left: torch.Tensor, right: torch.Tensor, width: float) -> None:
        operations = 2 * left.numel() * width
        self.forward += operations
        self.backward += operations * (left.requires_grad + right.requires_grad)


class _GroupedContext(Context):
    shapes: tuple[torch.Size, torch.Size]


class _Grouped(torch.autograd.Function):
    """The shapes of a product of rows with one matrix a group."""

    @staticmethod
    def forward(ctx: _GroupedContext, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """An output (S, N) of rows (S, K) and matrices (G, K, N)."""
        ctx.shapes = left.shape, right.shape
        ctx.save_for_backward(*([left] if right.requires_grad else []), *([right] if left.requires_grad else []))
        return left.new_empty(*left.shape[:-1], right.shape[-1])

    @staticmethod
    def backward(ctx: _GroupedContext, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of both."""
        of_left = gradients[0].new_empty(ctx.shapes[0]) if ctx.needs_input_grad[0] else None
        return of_left, gradients[0].new_empty(ctx.shapes[1]) if ctx.needs_input_grad[1] else None


_grouped: Callable[..., torch.Tensor] = _Grouped.apply


def grouped_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The output of torch's grouped_mm, which has no shapes for fp32."""
    return _grouped(left, right)
