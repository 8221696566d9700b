"""A LoRA layer as one operation on CPUs: the same products as PEFT's, without its passes over whole outputs."""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn

ADAPTER = "default"


class LowRank(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T, with the sum taken in the product; gradients for x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Outputs (..., N) of x (..., K), a frozen weight (N, K), A (R, K) and B (N, R) in any precision."""
        flat = x.reshape(-1, x.shape[-1])
        low, high = down.to(x.dtype), up.to(x.dtype)
        inner = torch.mm(flat, low.t()).mul_(scale)
        out = torch.mm(flat, weight.t()) if bias is None else torch.addmm(bias, flat, weight.t())
        out.addmm_(inner, high.t())
        ctx.save_for_backward(flat, inner, weight, low, high)
        ctx.scale, ctx.shape, ctx.precision = scale, x.shape, down.dtype
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Gradients of x, A and B, where they are asked for."""
        flat, inner, weight, low, high = ctx.saved_tensors
        given = gradients[0].reshape(-1, weight.shape[0])
        back = torch.mm(given, high).mul_(ctx.scale)
        of_x, _, _, of_down, of_up, _ = ctx.needs_input_grad
        return (
            torch.mm(given, weight).addmm_(back, low).view(ctx.shape) if of_x else None,
            None,
            None,
            torch.mm(back.t(), flat).to(ctx.precision) if of_down else None,
            torch.mm(given.t(), inner).to(ctx.precision) if of_up else None,
            None,
        )


_compute: Any = LowRank.apply


def _forward(layer: Linear, x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
    """A layer's forward that is one operation wherever PEFT would compute just that."""
    base: Any = layer.base_layer
    mixed = torch.is_autocast_enabled("cpu")
    precision = torch.get_autocast_dtype("cpu") if mixed else x.dtype
    alone = layer.active_adapters == [ADAPTER] and not (layer.merged or layer.disable_adapters)
    if arguments or named or not alone or base.weight.dtype != precision or x.device.type != "cpu":
        return type(layer).forward(layer, x, *arguments, **named)
    down: Any = layer.lora_A[ADAPTER]
    up: Any = layer.lora_B[ADAPTER]
    bias = None if base.bias is None else base.bias.to(precision)
    scale = layer.scaling[ADAPTER]
    given: torch.Tensor = _compute(x.to(precision), base.weight, bias, down.weight, up.weight, scale)
    return given


def one_operation(model: nn.Module) -> int:
    """Let LoRA layers over plain linear ones compute as `LowRank`; gives how many there are."""
    count = 0
    for layer in model.modules():
        if isinstance(layer, Linear) and _plain(layer):
            vars(layer)["forward"] = partial(_forward, layer)
            count += 1
    return count


def _plain(layer: Linear) -> bool:
    """Whether a layer is A and B beside a frozen linear layer: no dropout, DoRA, bias of its own or packed weight."""
    base = layer.get_base_layer()
    frozen = type(base) is nn.Linear and not any(p.requires_grad for p in base.parameters())
    known = set(layer.lora_A) == {ADAPTER} and not layer.lora_variant and not layer.lora_bias.get(ADAPTER)
    return known and frozen and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
