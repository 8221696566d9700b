"""Linear layers with fp32 weights under CPU bf16 autocast: saves one bf16 copy of the input and none of the weight."""

import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from llmtune.kernels.context import Context
from llmtune.kernels.cpu.copies import WeightCopies

MAX_REUSED_BYTES, MAX_PART_BYTES = 2**25, 2**23
"""The largest buffer that is kept for reuse, and the largest part of a weight gradient that is computed at once."""


class _Buffers:
    """Buffers that are reused, and the last input's copy: memory that stays costs less than memory taken again."""

    def __init__(self, copies: WeightCopies | None) -> None:
        self._copies = copies
        self._buffers: dict[tuple[torch.Size, torch.dtype, str], torch.Tensor] = {}
        self._input: Callable[[], torch.Tensor | None] = lambda: None
        self._version, self._copy = 0, torch.empty(0)

    def take(self, shape: torch.Size, dtype: torch.dtype, use: str) -> torch.Tensor:
        """Uninitialized memory, which the next call for the same shape, dtype and use returns again."""
        key = (shape, dtype, use)
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = torch.empty(shape, dtype=dtype)
            if buffer.nbytes <= MAX_REUSED_BYTES:
                self._buffers[key] = buffer
        return buffer

    def cast_weight(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight in `dtype`: its copy, or a buffer that the next weight of this shape overwrites."""
        copy = None if self._copies is None else self._copies.get(weight, dtype)
        if copy is not None:
            return copy
        return self.take(weight.shape, dtype, "weight").copy_(weight)

    def cast_input(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A detached copy of `x` in `dtype`, made once for all layers that take the same, unchanged tensor."""
        if self._input() is not x or self._version != x._version or self._copy.dtype != dtype:
            self._input, self._version = weakref.ref(x), x._version
            self._copy = x.detach().to(dtype)
        return self._copy


class PendingGradients:
    """Holds weight gradients in bf16 during backward and converts them to fp32 afterwards.

    Allocating fp32 gradients during backward would fragment the heap.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        """Hold a gradient of a weight; a weight may have several, which are summed."""
        self._pending.append((weight, gradient))

    def flush(self) -> None:
        """Add the pending gradients to each weight's `grad`, in the weight's precision."""
        while self._pending:
            weight, pending = self._pending.pop()
            gradient = pending.to(weight.dtype)
            weight.grad = gradient if weight.grad is None else gradient.add_(weight.grad)


class _LinearContext(Context):
    weight: torch.Tensor
    buffers: _Buffers
    pending: PendingGradients | None
    precision: torch.dtype


class CastLinear(torch.autograd.Function):
    """x W^T + bias, with matrix products in the precision of `low` (x in that precision), as under autocast."""

    @staticmethod
    def forward(
        ctx: _LinearContext,
        x: torch.Tensor,
        low: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        buffers: _Buffers,
        pending: PendingGradients | None,
    ) -> torch.Tensor:
        """Outputs (..., N) of x (..., K), weight (N, K) and bias (N); the weight's gradient goes to `pending`."""
        # A saved weight would come back as another tensor where hooks of saved tensors are active.
        ctx.save_for_backward(low)
        ctx.weight, ctx.buffers, ctx.pending, ctx.precision = weight, buffers, pending, x.dtype
        cast = buffers.cast_weight(weight, low.dtype)
        if bias is None:
            return nn.functional.linear(low, cast)
        # What a function returns may be changed in place only where it is no view, as linear's result is here.
        out = low.new_empty(*low.shape[:-1], len(cast))
        torch.addmm(bias.to(low.dtype), low.reshape(-1, low.shape[-1]), cast.t(), out=out.view(-1, len(cast)))
        return out

    @staticmethod
    def backward(ctx: _LinearContext, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, weight and bias, where they are needed."""
        (low,), weight = ctx.saved_tensors, ctx.weight
        needs_x, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        of_out = gradients[0].reshape(-1, weight.shape[0])
        of_x = of_weight = None
        if needs_x:
            cast = ctx.buffers.cast_weight(weight, low.dtype)
            of_x = torch.mm(of_out, cast).view(low.shape).to(ctx.precision)
            del cast
        if needs_weight:
            inputs = low.reshape(-1, low.shape[-1])
            if ctx.pending is not None:
                ctx.pending.add(weight, torch.mm(of_out.t(), inputs))
            else:
                of_weight = _weight_gradient(of_out, inputs, torch.empty_like(weight), ctx.buffers)
        return of_x, None, of_weight, of_out.sum(0).to(weight.dtype) if needs_bias else None, None, None


def _weight_gradient(
    of_out: torch.Tensor, inputs: torch.Tensor, gradient: torch.Tensor, buffers: _Buffers
) -> torch.Tensor:
    """Fill `gradient` (N, K) with of_out^T inputs, a few rows at a time, so that no whole bf16 product is allocated."""
    at_once = max(1, MAX_PART_BYTES // (inputs.element_size() * inputs.shape[1]))
    for start in range(0, len(gradient), at_once):
        out = gradient[start : start + at_once]
        part = buffers.take(out.shape, inputs.dtype, "gradient")
        out.copy_(torch.mm(of_out[:, start : start + at_once].t(), inputs, out=part))
    return gradient


_cast_linear: Callable[..., torch.Tensor] = CastLinear.apply


def _forward(
    layer: nn.Linear, buffers: _Buffers, pending: PendingGradients | None, input: torch.Tensor
) -> torch.Tensor:
    """A linear layer's forward: `CastLinear` under CPU autocast in training, the layer's own otherwise."""
    x = input
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled():
        return type(layer).forward(layer, x)
    with torch.autocast("cpu", enabled=False):
        low = buffers.cast_input(x, torch.get_autocast_dtype("cpu"))
        return _cast_linear(x, low, layer.weight, layer.bias, buffers, pending)


def patch_linears(model: nn.Module, pending: PendingGradients | None = None, copies: WeightCopies | None = None) -> int:
    """Patch linear layers with fp32 weights to compute as `CastLinear`; returns their number.

    With `pending`, their weights have gradients only after its `flush`; with `copies`, they are cast once a step.
    """
    buffers = _Buffers(copies)
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and layer.weight.dtype == torch.float32]
    unpatched = [layer for layer in layers if not vars(layer).get("forward")]
    for layer in unpatched:
        vars(layer)["forward"] = partial(_forward, layer, buffers, pending)
    if copies is not None:
        copies.watch(unpatched)
    return len(unpatched)


def patch_embedding(model: PreTrainedModel) -> bool:
    """Make a tied embedding's gradient sparse, so it is added to the head's row by row; returns whether it is tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = type(embedding) is nn.Embedding and head is not None and head.weight is embedding.weight
    if tied:
        embedding.sparse = True
    return tied
