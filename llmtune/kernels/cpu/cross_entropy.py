"""Cross-entropy whose gradient is computed in the forward pass, a few rows at a time, on CPUs."""

from collections.abc import Callable

import torch
from torch.nn import functional

from llmtune.kernels.context import Context

MAX_ELEMENTS = 2**20
"""The most logits that are in fp32 at one time."""


class _LossContext(Context):
    gradient: torch.Tensor | None


class CrossEntropy(torch.autograd.Function):
    """The sum over rows of -log softmax(logits)[target], times `scale`; saves the gradient in the logits' precision.

    All rows are never in fp32 together: torch's own way writes and reads them there four times.
    """

    @staticmethod
    def forward(ctx: _LossContext, logits: torch.Tensor, targets: torch.Tensor, scale: float) -> torch.Tensor:
        """A scalar in fp32 for logits (N, V) in any precision and targets (N)."""
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        at_once = max(1, MAX_ELEMENTS // logits.shape[1])
        buffer = torch.empty(at_once, logits.shape[1], dtype=torch.float32, device=logits.device)
        for start in range(0, len(logits), at_once):
            classes = targets[start : start + at_once, None]
            rows = buffer[: len(classes)].copy_(logits[start : start + at_once])
            of_target, largest = rows.gather(1, classes), rows.amax(1, keepdim=True)
            sums = rows.sub_(largest).exp_().sum(1, keepdim=True)
            total += (sums.log() + largest - of_target).sum()
            if gradient is not None:
                rows.mul_(scale / sums)
                rows.scatter_add_(1, classes, torch.full_like(sums, -scale))
                gradient[start : start + at_once] = rows
        ctx.gradient = gradient
        return total * scale

    @staticmethod
    def backward(ctx: _LossContext, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of the logits, saved by the forward pass; only one backward pass can use it."""
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the gradient of this cross-entropy was used by an earlier backward pass")
        return gradient if gradients[0] == 1 else gradient.mul_(gradients[0]), None, None


_cross_entropy: Callable[..., torch.Tensor] = CrossEntropy.apply


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, scale: float) -> torch.Tensor:
    """The sum of the cross-entropies of logits (N, V) to targets (N), times `scale`, in fp32."""
    if logits.device.type != "cpu":
        return functional.cross_entropy(logits.float(), targets, reduction="sum") * scale
    return _cross_entropy(logits, targets, scale)
