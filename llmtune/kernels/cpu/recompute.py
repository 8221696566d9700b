"""RMS norms and gated MLPs that keep little for the backward pass, on CPUs: what is cheap is computed again."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
"""What transformers calls the parts of a gated MLP, down(act(gate(x)) * up(x))."""


class RMSNorm(torch.autograd.Function):
    """weight * x / rms(x), computed in fp32; keeps x alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Outputs (..., N) of x (..., N) and a weight (N)."""
        wide = x.float()
        scale = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Gradients of x and weight."""
        x, weight, scale = ctx.saved_tensors
        given, unit, of_weight = gradients[0], x * scale, None
        if ctx.needs_input_grad[1]:
            of_weight = (given * unit.to(x.dtype)).flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype)
        of_unit = (given * weight).to(x.dtype).float()
        along = (of_unit * unit).mean(-1, keepdim=True)
        return of_unit.sub_(unit.mul_(along)).mul_(scale).to(x.dtype), of_weight, None


class GatedProduct(torch.autograd.Function):
    """act(gate) * up; keeps gate and up alone."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, act: nn.Module) -> torch.Tensor:
        """Products (..., N) of gate and up (..., N)."""
        ctx.save_for_backward(gate, up)
        ctx.act = act
        product: torch.Tensor = act(gate) * up
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Gradients of gate and up."""
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            opened = ctx.act(leaf)
        (of_gate,) = torch.autograd.grad(opened, leaf, gradients[0] * up)
        return of_gate, gradients[0] * opened.detach(), None


_normalise: Any = RMSNorm.apply
_multiply: Any = GatedProduct.apply


def _norm(norm: nn.Module, eps: float, x: torch.Tensor) -> torch.Tensor:
    given: torch.Tensor = _normalise(x, norm.weight, eps)
    return given


def _mlp(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """A gated MLP's forward; what its last layer keeps of the product is computed again from gate and up."""
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    if not (gate.requires_grad or up.requires_grad):
        plain: torch.Tensor = mlp.down_proj(mlp.act_fn(gate) * up)
        return plain
    product = _multiply(gate, up, mlp.act_fn)
    place, count, dtype = product.data_ptr(), product.numel(), product.dtype
    gate, up = gate.detach(), up.detach()

    def keep(tensor: torch.Tensor) -> tuple[torch.Tensor | None, torch.Size]:
        same = (tensor.data_ptr(), tensor.numel(), tensor.dtype) == (place, count, dtype)
        return (None if same and tensor.is_contiguous() else tensor), tensor.shape

    def again(kept: tuple[torch.Tensor | None, torch.Size]) -> torch.Tensor:
        tensor, shape = kept
        return (mlp.act_fn(gate) * up).view(shape) if tensor is None else tensor

    with saved_tensors_hooks(keep, again):
        given: torch.Tensor = mlp.down_proj(product)
    return given


def patch_norms(model: nn.Module) -> int:
    """Let RMS norms that compute just what `RMSNorm` does keep their input alone; gives how many there are."""
    norms = [module for module in model.modules() if _eps(module) is not None and not vars(module).get("forward")]
    alike = [norm for norm in norms if [(n, p.ndim) for n, p in norm.named_parameters()] == [("weight", 1)]]
    proved = {kind: _is_rms_norm(norm) for kind, norm in {type(norm): norm for norm in alike}.items()}
    chosen = [norm for norm in alike if proved[type(norm)]]
    for norm in chosen:
        vars(norm)["forward"] = partial(_norm, norm, _eps(norm))
    return len(chosen)


def patch_mlps(model: nn.Module) -> int:
    """Let gated MLPs keep the outputs of their first two layers alone; gives how many there are.

    Not for activation checkpointing, which keeps less, and whose hooks these would replace.
    """
    alike = [module for module in model.modules() if {name for name, _ in module.named_children()} == set(PARTS)]
    proved = {kind: _is_gated(kind) for kind in {type(mlp) for mlp in alike}}
    chosen = [mlp for mlp in alike if proved[type(mlp)] and not vars(mlp).get("forward")]
    for mlp in chosen:
        vars(mlp)["forward"] = partial(_mlp, mlp)
    return len(chosen)


def _eps(norm: nn.Module) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


@torch.no_grad()
def _is_rms_norm(norm: Any) -> bool:
    """Whether a norm's own forward gives the same bits, with a weight that is not its own."""
    count = len(norm.weight)
    weight = torch.linspace(-2, 2, count)
    x = torch.linspace(-3, 5, 7 * count).view(7, count)
    pairs = [(x, weight), (x.bfloat16(), weight.bfloat16()), (x.bfloat16(), weight)]
    return all(
        torch.equal(functional_call(norm, {"weight": weight}, (x,)), _normalise(x, weight, _eps(norm)))
        for x, weight in pairs
    )


def _is_gated(kind: Any) -> bool:
    """Whether a class's forward is down(act(gate(x)) * up(x)), by what it makes of parts that are simple functions."""
    mlp = SimpleNamespace(
        gate_proj=lambda x: x - 1, up_proj=lambda x: 3 * x, down_proj=lambda x: x + 0.5, act_fn=torch.sigmoid
    )
    x = torch.linspace(-2, 2, 9)
    try:
        return torch.equal(kind.forward(mlp, x), torch.sigmoid(x - 1) * (3 * x) + 0.5)
    except AttributeError:  # it needs more than these parts
        return False
