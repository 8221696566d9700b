"""Cross-entropy whose gradient is made in the forward pass, a few rows at a time, on CPUs."""

from typing import Any

import torch
from torch.nn import functional

ELEMENTS = 2**20


class CrossEntropy(torch.autograd.Function):
    """The sum over rows of -log softmax(logits)[target], times `scale`; keeps the gradient in the logits' precision.

    The whole rows never stand in fp32: torch's way writes and reads them there four times.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, scale: float) -> torch.Tensor:
        """A scalar in fp32 for logits (N, V) in any precision and targets (N)."""
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        at_once = max(1, ELEMENTS // logits.shape[1])
        space = torch.empty(at_once, logits.shape[1], dtype=torch.float32, device=logits.device)
        for start in range(0, len(logits), at_once):
            of_rows = targets[start : start + at_once, None]
            rows = space[: len(of_rows)].copy_(logits[start : start + at_once])
            wanted, largest = rows.gather(1, of_rows), rows.amax(1, keepdim=True)
            sums = rows.sub_(largest).exp_().sum(1, keepdim=True)
            total += (sums.log() + largest - wanted).sum()
            if gradient is not None:
                rows.mul_(scale / sums)
                rows.scatter_add_(1, of_rows, torch.full_like(sums, -scale))
                gradient[start : start + at_once] = rows
        ctx.gradient = gradient
        return total * scale

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """The gradient of the logits, kept from the forward pass; it can be asked for once."""
        kept, ctx.gradient = ctx.gradient, None
        return kept if gradients[0] == 1 else kept.mul_(gradients[0]), None, None


_compute: Any = CrossEntropy.apply


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, scale: float) -> torch.Tensor:
    """The sum of the cross-entropies of logits (N, V) to targets (N), times `scale`, in fp32."""
    if logits.device.type != "cpu":
        return functional.cross_entropy(logits.float(), targets, reduction="sum") * scale
    total: torch.Tensor = _compute(logits, targets, scale)
    return total
