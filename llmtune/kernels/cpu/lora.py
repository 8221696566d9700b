"""A LoRA layer as one operation on CPUs: the same products as PEFT's, without its passes over whole outputs."""

from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit as Packed
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import Linear
from torch import nn

ADAPTER = "default"


class FusedLora(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T, with the sum taken in the product; gradients for x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        base: nn.Module,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Outputs (..., N) of x (..., K), a frozen layer's weight (N, K), A (R, K) and B (N, R) in any precision."""
        flat, weight = x.reshape(-1, x.shape[-1]), _weight(base, x.dtype)
        low, high = down.to(x.dtype), up.to(x.dtype)
        inner = torch.mm(flat, low.t()).mul_(scale)
        out = torch.mm(flat, weight.t()) if bias is None else torch.addmm(bias, flat, weight.t())
        out.addmm_(inner, high.t())
        ctx.save_for_backward(flat, inner, low, high)
        ctx.base, ctx.scale, ctx.shape, ctx.precision = base, scale, x.shape, down.dtype
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Gradients of x, A and B, where they are asked for."""
        flat, inner, low, high = ctx.saved_tensors
        given = gradients[0].reshape(-1, len(high))
        back = torch.mm(given, high).mul_(ctx.scale)
        of_x, _, _, of_down, of_up, _ = ctx.needs_input_grad
        return (
            torch.mm(given, _weight(ctx.base, given.dtype)).addmm_(back, low).view(ctx.shape) if of_x else None,
            None,
            None,
            torch.mm(back.t(), flat).to(ctx.precision) if of_down else None,
            torch.mm(given.t(), inner).to(ctx.precision) if of_up else None,
            None,
        )


_compute: Any = FusedLora.apply


def _weight(base: Any, precision: torch.dtype) -> torch.Tensor:
    """The weight (N, K) of a frozen layer, made whole where it lies in 4 bits."""
    whole: torch.Tensor = base.weight
    if _packed(base):
        whole = dequantize_4bit(base.weight.data, base.weight.quant_state).to(precision)
    return whole


def _packed(base: Any) -> bool:
    return getattr(base.weight, "quant_state", None) is not None


def _forward(layer: Linear | Linear4bit, x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
    """A layer's forward that is one operation wherever PEFT would compute just that."""
    base: Any = layer.base_layer
    mixed = torch.is_autocast_enabled("cpu")
    precision = torch.get_autocast_dtype("cpu") if mixed else x.dtype
    alone = layer.active_adapters == [ADAPTER] and not (layer.merged or layer.disable_adapters)
    computes = base.compute_dtype if _packed(base) else base.weight.dtype
    if arguments or named or not alone or computes != precision or x.device.type != "cpu":
        return type(layer).forward(layer, x, *arguments, **named)
    down: Any = layer.lora_A[ADAPTER]
    up: Any = layer.lora_B[ADAPTER]
    bias = None if base.bias is None else base.bias.to(precision)
    scale = layer.scaling[ADAPTER]
    given: torch.Tensor = _compute(x.to(precision), base, bias, down.weight, up.weight, scale)
    return given


def patch_lora(model: nn.Module) -> int:
    """Let LoRA layers over linear ones, plain or in 4 bits, compute as `LowRank`; gives how many there are."""
    count = 0
    for layer in model.modules():
        if isinstance(layer, Linear | Linear4bit) and _plain(layer):
            vars(layer)["forward"] = partial(_forward, layer)
            count += 1
    return count


def _plain(layer: Linear | Linear4bit) -> bool:
    """Whether a layer is A and B beside a frozen linear layer, and no dropout, DoRA, or bias of its own."""
    base: Any = layer.get_base_layer()
    upright = not _packed(base) or base.weight.quant_state.shape == (base.out_features, base.in_features)
    linear = type(base) in (nn.Linear, Packed) and upright
    frozen = linear and not any(p.requires_grad for p in base.parameters())
    known = set(layer.lora_A) == {ADAPTER} and not layer.lora_variant and not layer.lora_bias.get(ADAPTER)
    return known and frozen and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
