"""What trains in fp32 under bf16 autocast, on CPUs: no copy of a weight is kept, and one of what goes into it."""

import weakref
from functools import partial
from typing import Any

import torch
from torch import nn

LARGE, PART = 2**25, 2**23
"""Bytes above which space is not held between two uses, and of a gradient in low precision at one time."""


class _Space:
    """Room for one product at a time: memory that stays costs less than memory that is given back and taken again."""

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], torch.Tensor] = {}
        self._input: Any = lambda: None
        self._version, self._copy = 0, torch.empty(0)

    def take(self, shape: torch.Size, dtype: torch.dtype, use: str) -> torch.Tensor:
        """Uninitialised memory, which the next call for the same shape and use gives again."""
        key = (shape, dtype, use)
        made = self._held.get(key)
        if made is None:
            made = torch.empty(shape, dtype=dtype)
            if made.nbytes <= LARGE:
                self._held[key] = made
        return made

    def cast(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A weight in `dtype`, in memory that the next weight of this shape takes."""
        return self.take(weight.shape, dtype, "weight").copy_(weight)

    def low(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A detached copy of `x` in `dtype`: the last one again, where it is of the same tensor, unchanged since."""
        if self._input() is not x or self._version != x._version or self._copy.dtype != dtype:
            self._input, self._version = weakref.ref(x), x._version
            self._copy = x.detach().to(dtype)
        return self._copy


class PendingGradients:
    """Gradients in the precision of the products that gave them, until a backward pass is over.

    What a pass frees lies in pieces that few gradients in fp32 would fit; when it is over, they have room.
    """

    def __init__(self) -> None:
        self._products: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, weight: torch.Tensor, product: torch.Tensor) -> None:
        """Keep a weight's gradient, or a summand of it."""
        self._products.append((weight, product))

    def give(self) -> None:
        """Add each weight's gradients to its `grad`, in the weight's precision."""
        while self._products:
            weight, product = self._products.pop()
            whole = product.to(weight.dtype)
            weight.grad = whole if weight.grad is None else whole.add_(weight.grad)


class CastLinear(torch.autograd.Function):
    """x W^T + bias with the products in the precision of `low`, which is x in it, as autocast has them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        low: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        space: _Space,
        held: PendingGradients | None,
    ) -> torch.Tensor:
        """Outputs (..., N) of x (..., K), a weight (N, K) and a bias (N); the weight's gradient goes to `held`."""
        # Saved, the weight would come back as another tensor where hooks of saved tensors are at work.
        ctx.save_for_backward(low)
        ctx.weight, ctx.space, ctx.held, ctx.precision = weight, space, held, x.dtype
        cast = space.cast(weight, low.dtype)
        return nn.functional.linear(low, cast, None if bias is None else bias.to(low.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Gradients of x, weight and bias, where they are asked for."""
        (low,), weight = ctx.saved_tensors, ctx.weight
        of_x, _, of_weight, of_bias, *_ = ctx.needs_input_grad
        given = gradients[0].reshape(-1, weight.shape[0])
        back = product = None
        if of_x:
            cast = ctx.space.cast(weight, low.dtype)
            back = torch.mm(given, cast).view(low.shape).to(ctx.precision)
            del cast
        if of_weight:
            inputs = low.reshape(-1, low.shape[-1])
            if ctx.held is not None:
                ctx.held.add(weight, torch.mm(given.t(), inputs))
            else:
                product = _in_parts(given, inputs, torch.empty_like(weight), ctx.space)
        return back, None, product, given.sum(0).to(weight.dtype) if of_bias else None, None, None


def _in_parts(given: torch.Tensor, inputs: torch.Tensor, product: torch.Tensor, space: _Space) -> torch.Tensor:
    """given^T inputs in the precision of `product`, from products in theirs of which few stand at one time."""
    at_once = max(1, PART // (inputs.element_size() * inputs.shape[1]))
    for start in range(0, len(product), at_once):
        out = product[start : start + at_once]
        part = space.take(out.shape, inputs.dtype, "gradient")
        out.copy_(torch.mm(given[:, start : start + at_once].t(), inputs, out=part))
    return product


_compute: Any = CastLinear.apply


def _forward(layer: nn.Linear, space: _Space, held: PendingGradients | None, x: torch.Tensor) -> torch.Tensor:
    """A linear layer's forward: `CastLinear` under autocast, its own everywhere else."""
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled():
        return type(layer).forward(layer, x)
    with torch.autocast("cpu", enabled=False):
        low = space.low(x, torch.get_autocast_dtype("cpu"))
        given: torch.Tensor = _compute(x, low, layer.weight, layer.bias, space, held)
    return given


def patch_linears(model: nn.Module, held: PendingGradients | None = None) -> int:
    """Let linear layers with fp32 weights compute as `CastLinear`; gives how many there are.

    Their weights' gradients are there once `held` has given them, and as ever without it.
    """
    space = _Space()
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and layer.weight.dtype == torch.float32]
    chosen = [layer for layer in layers if not vars(layer).get("forward")]
    for layer in chosen:
        vars(layer)["forward"] = partial(_forward, layer, space, held)
    return len(chosen)


def patch_embedding(model: Any) -> bool:
    """Let the embedding add its gradient to the head's, row by row, where the two are one matrix; gives whether."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    one = type(embedding) is nn.Embedding and head is not None and head.weight is embedding.weight
    if one:
        embedding.sparse = True
    return one
