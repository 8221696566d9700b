"""LoRA layers as one autograd function: PEFT's matrix products, without its extra passes over inputs and outputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora.bnb import Linear4bit as Lora4bit
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from llmtune.kernels import device
from llmtune.kernels.context import Context

ADAPTER = "default"
"""The name that PEFT gives to a model's first adapter."""


class _LoraContext(Context):
    base: nn.Linear
    scale: float
    shape: torch.Size
    precision: torch.dtype


class FusedLora(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T, summed inside the last product; gradients for x, A and B."""

    @staticmethod
    def forward(
        ctx: _LoraContext,
        x: torch.Tensor,
        base: nn.Linear,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Outputs (..., N) of x (..., K), a frozen layer's weight (N, K), `down` A (R, K) and `up` B (N, R)."""
        flat, weight = x.reshape(-1, x.shape[-1]), _weight(base, x.dtype)
        low_down, low_up = down.to(x.dtype), up.to(x.dtype)
        inner = torch.mm(flat, low_down.t()).mul_(scale)
        # What a function returns may be changed in place only where it is no view.
        out = x.new_empty(*x.shape[:-1], len(low_up))
        rows = out.view(-1, len(low_up))
        torch.mm(flat, weight.t(), out=rows) if bias is None else torch.addmm(bias, flat, weight.t(), out=rows)
        rows.addmm_(inner, low_up.t())
        ctx.save_for_backward(flat, inner, low_down, low_up)
        ctx.base, ctx.scale, ctx.shape, ctx.precision = base, scale, x.shape, down.dtype
        return out

    @staticmethod
    def backward(ctx: _LoraContext, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, A and B, where they are needed."""
        flat, inner, low_down, low_up = ctx.saved_tensors
        of_out = gradients[0].reshape(-1, len(low_up))
        of_inner = torch.mm(of_out, low_up).mul_(ctx.scale)
        needs_x, _, _, needs_down, needs_up, _ = ctx.needs_input_grad
        of_x = None
        if needs_x:
            of_x = torch.mm(of_out, _weight(ctx.base, of_out.dtype)).addmm_(of_inner, low_down).view(ctx.shape)
        of_down = torch.mm(of_inner.t(), flat).to(ctx.precision) if needs_down else None
        of_up = torch.mm(of_out.t(), inner).to(ctx.precision) if needs_up else None
        return of_x, None, None, of_down, of_up, None


_fused_lora: Callable[..., torch.Tensor] = FusedLora.apply


def _weight(base: nn.Linear, precision: torch.dtype) -> torch.Tensor:
    """The weight (N, K) of a frozen layer, dequantized into `precision` where it is stored in 4 bits."""
    if not _is_4bit(base):
        return base.weight
    dequantized: torch.Tensor = dequantize_4bit(base.weight.data, _quant_state(base))
    return dequantized.to(precision)


def _quant_state(base: nn.Linear) -> Any:
    return getattr(base.weight, "quant_state", None)


def _is_4bit(base: nn.Linear) -> bool:
    return _quant_state(base) is not None


def _forward(layer: LoraLinear | Lora4bit, x: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
    """A LoRA layer's forward: `FusedLora` where PEFT would compute exactly that, else PEFT's own."""
    base = layer.base_layer
    precision = device.autocast_dtype(x.device) or x.dtype
    alone = layer.active_adapters == [ADAPTER] and not (layer.merged or layer.disable_adapters)
    computes = base.compute_dtype if _is_4bit(base) else base.weight.dtype
    if arguments or options or not alone or computes != precision:
        return type(layer).forward(layer, x, *arguments, **options)
    down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    bias = None if base.bias is None else base.bias.to(precision)
    scale = layer.scaling[ADAPTER]
    return _fused_lora(x.to(precision), base, bias, down.weight, up.weight, scale)


def patch_lora(model: nn.Module) -> int:
    """Patch LoRA layers over linear layers, 4-bit ones too, to compute as `FusedLora`; returns their number."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLinear | Lora4bit) and _is_plain(layer)]
    for layer in layers:
        vars(layer)["forward"] = partial(_forward, layer)
    return len(layers)


def _is_plain(layer: LoraLinear | Lora4bit) -> bool:
    """Whether a layer is A and B beside a frozen linear layer, without dropout, DoRA, or a bias of its own."""
    base = layer.get_base_layer()
    upright = not _is_4bit(base) or _quant_state(base).shape == (base.out_features, base.in_features)
    linear = type(base) in (nn.Linear, Linear4bit) and upright
    frozen = linear and not any(p.requires_grad for p in base.parameters())
    known = set(layer.lora_A) == {ADAPTER} and not layer.lora_variant and not layer.lora_bias.get(ADAPTER)
    return known and frozen and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)


def skip_input_casts(model: nn.Module) -> None:
    """Let LoRA layers give 16-bit input straight to autocast; PEFT's way through fp32 and back gives the same bits."""
    for module in (module for module in model.modules() if isinstance(module, LoraLayer)):
        # A dropout or a variant (DoRA) computes in the precision that it is given.
        dropouts = module.lora_dropout.values()
        if not module.lora_variant and all(isinstance(dropout, nn.Identity) for dropout in dropouts):
            module.cast_input_dtype_enabled = False
