"""The loss inside the language-model head: on accelerators the logits of all positions never exist at one time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel

from llmtune.kernels import device as ways
from llmtune.kernels.logit_scale import LogitScale, logit_probe, recognize

HEAD_CHUNK_BYTES = 2**30
"""The most bytes that the logits of the rows of one chunk take, with all that is computed from them."""
LOGIT_BYTES = 10
"""Bytes a logit takes: its value and gradient in low precision, two copies in fp32."""


def rows_at_once(vocabulary: int) -> int:
    """Rows whose logits fit into `HEAD_CHUNK_BYTES`, at least one."""
    return max(1, HEAD_CHUNK_BYTES // (LOGIT_BYTES * vocabulary))


def computes_in_head(device: torch.device) -> bool:
    """Whether the loss is computed in the head there; CPUs have a faster way of their own, over all logits."""
    return not ways.on_cpu(device)


class _HeadContext(FunctionCtx):
    needs_input_grad: tuple[bool, ...]
    gradients: tuple[torch.Tensor | None, ...] | None
    precisions: tuple[torch.dtype | None, ...]


class HeadLoss(torch.autograd.Function):
    """The sum of the cross-entropies of a head's logits; the forward pass computes the gradients, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: _HeadContext,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        scale: LogitScale,
        precision: torch.dtype,
    ) -> torch.Tensor:
        """A scalar in fp32 for hidden states (N, H), weight (V, H), bias (V), targets (N); products in `precision`."""
        needs = ctx.needs_input_grad[:3]
        low, low_weight = hidden.to(precision), weight.to(precision)
        low_bias = None if bias is None else bias.to(precision)
        of_hidden, of_weight, of_bias = (
            torch.zeros(x.shape, dtype=torch.float32, device=x.device) if needed and x is not None else None
            for needed, x in zip(needs, (hidden, weight, bias), strict=True)
        )
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        at_once = rows_at_once(len(weight))
        for start in range(0, len(low), at_once):
            rows = low[start : start + at_once]
            outputs = functional.linear(rows, low_weight, low_bias)
            classes = targets[start : start + at_once, None]
            if not any(needs):
                total -= torch.log_softmax(scale(outputs), 1).gather(1, classes).sum()
                continue
            loss, gradient = loss_and_gradient(outputs, classes, scale)
            total += loss
            if of_hidden is not None:
                add_product(of_hidden[start : start + at_once], gradient, low_weight)
            if of_weight is not None:
                add_product(of_weight, gradient.t(), rows)
            if of_bias is not None:
                of_bias += gradient.sum(0, dtype=torch.float32)
        ctx.gradients = (of_hidden, of_weight, of_bias)
        ctx.precisions = tuple(None if x is None else x.dtype for x in (hidden, weight, bias))
        return total

    @staticmethod
    def backward(ctx: _HeadContext, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients times the loss's own; only one backward pass can use them."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of this head's loss were used by an earlier backward pass")
        scaled = (
            None if gradient is None else gradient.mul_(outer[0]).to(precision)
            for gradient, precision in zip(gradients, ctx.precisions, strict=True)
        )
        return *scaled, None, None, None


def loss_and_gradient(
    outputs: torch.Tensor, targets: torch.Tensor, scale: LogitScale
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the losses of a head's outputs (N, V) and targets (N, 1), and the outputs' gradient in their place."""
    plain = scale == LogitScale()
    logits = outputs if plain else scale(outputs)  # a GPU converts what it reads, without another copy in fp32
    logarithms = torch.log_softmax(logits, 1, dtype=torch.float32)
    of_target = logarithms.gather(1, targets)
    gradient = logarithms.exp_().scatter_(1, targets, of_target.expm1())
    if scale.cap is not None:
        gradient.mul_(logits.div_(scale.cap).square_().neg_().add_(1))
    if scale.scale != 1:
        gradient.mul_(scale.scale)
    return -of_target.sum(), outputs.copy_(gradient)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left @ right to an fp32 `total`, unrounded: rounded parts of a sum would bias a gradient."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif adds_to_fp32(left.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


@cache
def adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device adds products of matrices in `dtype` to an fp32 sum at once; CPUs do not, some GPUs may not."""
    ones, total = torch.ones(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # NotImplementedError, for a device without such a kernel, is a RuntimeError
        return False
    return bool((total == 16).all())


_head_loss: Callable[..., torch.Tensor] = HeadLoss.apply


def head_loss(head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, scale: LogitScale) -> torch.Tensor:
    """The sum in fp32 of the cross-entropies of hidden states (N, H) to targets (N), under autocast or not."""
    device = hidden.device.type
    mixed = torch.is_autocast_enabled(device)
    precision = torch.get_autocast_dtype(device) if mixed else head.weight.dtype
    tensors: tuple[torch.Tensor | None, ...] = (hidden, head.weight, head.bias)
    if not torch.is_grad_enabled():
        tensors = tuple(None if x is None else x.detach() for x in tensors)
    with torch.autocast(device, enabled=False):
        return _head_loss(*tensors, targets, scale, precision)


class Supervised(NamedTuple):
    """Where a batch (B, T) is supervised: rows (N) and columns (N) of the positions, and the tokens (N) that follow."""

    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor


class SupervisedHead:
    """Lets a model's head see supervised positions alone, and give their loss in place of logits where that pays.

    It patches the model once; nothing changes outside of `at`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        head: nn.Module = model.get_output_embeddings()
        # A head that an adapter changes, or that stores its weight otherwise, computes its logits itself.
        self._linear = head if type(head) is nn.Linear and head.weight.is_floating_point() else None
        self._probe = torch.empty(0)
        self._scale: LogitScale | None = None
        self._recognized = False
        self._at: Supervised | None = None
        self._hidden: torch.Tensor | None = None
        self._compute_logits: Callable[..., torch.Tensor] = head.forward
        self._compute_outputs: Callable[..., Any] = model.forward
        vars(head)["forward"] = self._forward_head
        # A bound method, since Accelerate takes its own wrapper off by making a method of what is below.
        vars(model)["forward"] = MethodType(lambda _, *inputs, **named: self._forward_model(*inputs, **named), model)

    @contextmanager
    def at(self, supervised: Supervised) -> Iterator[None]:
        """Outputs of the model have `logits` (N, V) at these positions alone, or the sum of their losses as `loss`."""
        self._at = supervised
        try:
            yield
        finally:
            self._at = self._hidden = None

    def _forward_head(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._at is None:
            return self._compute_logits(hidden)
        chosen = hidden[self._at.rows, self._at.columns]
        known = self._scale is not None or not self._recognized
        if self._linear is None or not known or not computes_in_head(chosen.device) or is_sharded(self._linear):
            return self._compute_logits(chosen)
        self._hidden = chosen
        if not len(self._probe):
            self._probe = logit_probe(len(self._linear.weight), chosen.device)
        return self._probe

    def _forward_model(self, *inputs: Any, **named: Any) -> Any:
        outputs = self._compute_outputs(*inputs, **named)
        if self._linear is None or self._at is None or self._hidden is None:
            return outputs
        if not self._recognized:
            self._scale, self._recognized = recognize(self._probe, outputs["logits"]), True
        if self._scale is None:
            self._hidden = None
            return self._compute_outputs(*inputs, **named)
        outputs["loss"] = head_loss(self._linear, self._hidden, self._at.targets, self._scale)
        return outputs


def is_sharded(head: nn.Linear) -> bool:
    """Whether a head's whole weight is in this process only while the head itself computes, or never."""
    return isinstance(head, FSDPModule) or isinstance(head.weight, DTensor)
