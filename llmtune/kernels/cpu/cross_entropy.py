"""Cross-entropy over logits whose gradient is computed in the forward pass, a few rows at a time."""

from collections.abc import Callable

import torch

from llmtune.kernels import device as ways
from llmtune.kernels.context import Context

MAX_ELEMENTS = 2**20
"""The most logits that are in fp32 at one time on CPUs, where they then stay in the cache."""
MAX_ELEMENTS_ON_DEVICE = 2**26
"""The same on accelerators, where every operation costs a launch."""


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
        elements = MAX_ELEMENTS if ways.on_cpu(logits.device) else MAX_ELEMENTS_ON_DEVICE
        at_once = max(1, elements // logits.shape[1])
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
        # Elsewhere the comparison would wait for the device.
        unchanged = ways.on_cpu(gradient.device) and bool(gradients[0] == 1)
        return gradient if unchanged else gradient.mul_(gradients[0]), None, None


_cross_entropy: Callable[..., torch.Tensor] = CrossEntropy.apply


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """The sum of the cross-entropies of logits (N, V) to targets (N), times `scale`, in fp32."""
    if isinstance(scale, torch.Tensor):
        return _cross_entropy(logits, targets, 1.0) * scale
    return _cross_entropy(logits, targets, scale)
