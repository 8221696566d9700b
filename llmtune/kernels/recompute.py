"""RMS norms and gated MLPs that save less for the backward pass and recompute what is cheap."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from llmtune.kernels import device
from llmtune.kernels.context import Context

PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
"""The names in transformers for the parts of a gated MLP, down(act(gate(x)) * up(x))."""


class GatedMlp(Protocol):
    """A module with the parts of a gated MLP."""

    gate_proj: Callable[[torch.Tensor], torch.Tensor]
    up_proj: Callable[[torch.Tensor], torch.Tensor]
    down_proj: Callable[[torch.Tensor], torch.Tensor]
    act_fn: Callable[[torch.Tensor], torch.Tensor]


class _Activation:
    """act(gate) as the backward pass computes it: once for the product that it recomputes and for the gradient."""

    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.act = act
        self._computed: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A leaf with gate's values and, differentiable with respect to it, its activation."""
        if self._computed is None:
            with torch.enable_grad():
                leaf = gate.detach().requires_grad_()
                self._computed = leaf, self.act(leaf)
        return self._computed

    def forget(self) -> None:
        """Let the memory go."""
        self._computed = None


class _ProductContext(Context):
    activation: _Activation


class RMSNorm(torch.autograd.Function):
    """weight * x / rms(x), computed in fp32; saves x, the weight, and one scale per row."""

    @staticmethod
    def forward(ctx: Context, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Outputs (..., N) of x (..., N) and a weight (N)."""
        wide = x.float()
        scale = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Context, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and weight."""
        x, weight, scale = ctx.saved_tensors
        of_out, unit, of_weight = gradients[0], x * scale, None
        if ctx.needs_input_grad[1]:
            of_weight = (of_out * unit.to(x.dtype)).flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype)
        of_unit = (of_out * weight).to(x.dtype).float()
        along = (of_unit * unit).mean(-1, keepdim=True)
        return of_unit.sub_(unit.mul_(along)).mul_(scale).to(x.dtype), of_weight, None


class GatedProduct(torch.autograd.Function):
    """act(gate) * up; saves only gate and up."""

    @staticmethod
    def forward(ctx: _ProductContext, gate: torch.Tensor, up: torch.Tensor, activation: _Activation) -> torch.Tensor:
        """Products (..., N) of gate and up (..., N)."""
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation.act(gate) * up

    @staticmethod
    def backward(ctx: _ProductContext, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of gate and up."""
        gate, up = ctx.saved_tensors
        leaf, activated = ctx.activation.of(gate)
        ctx.activation.forget()
        (of_gate,) = torch.autograd.grad(activated, leaf, gradients[0] * up)
        return of_gate, gradients[0] * activated.detach(), None


_rms_norm: Callable[..., torch.Tensor] = RMSNorm.apply
_multiply: Callable[..., torch.Tensor] = GatedProduct.apply


def _norm_forward(norm: nn.Module, eps: float | None, *arguments: torch.Tensor, **options: object) -> torch.Tensor:
    """`RMSNorm` of what a norm is given, or its own forward where that is more than one tensor, such as a gate."""
    if len(arguments) != 1 or options:
        return type(norm).forward(norm, *arguments, **options)
    x, weight = arguments[0], norm.get_parameter("weight")
    if device.on_cpu(x.device) or x.dtype != weight.dtype:
        return _rms_norm(x, weight, eps)
    # One launch each way, and saves as little; autocast would compute and return it in fp32.
    with device.without_autocast(x.device):
        return nn.functional.rms_norm(x, weight.shape, weight, eps)


def _mlp_forward(mlp: Any, *arguments: torch.Tensor, **options: object) -> torch.Tensor:
    """A gated MLP's forward whose last layer saves no product: backward recomputes it from gate and up.

    Its own forward where it is given more than one tensor.
    """
    if len(arguments) != 1 or options:
        return type(mlp).forward(mlp, *arguments, **options)
    return _recompute_product(mlp, arguments[0])


def _recompute_product(mlp: GatedMlp, x: torch.Tensor) -> torch.Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    # A compiler chooses by itself what to save, and cannot follow hooks.
    if torch.compiler.is_compiling() or not (gate.requires_grad or up.requires_grad):
        return mlp.down_proj(mlp.act_fn(gate) * up)
    activation = _Activation(mlp.act_fn)
    product = _multiply(gate, up, activation)
    address, count, dtype = product.data_ptr(), product.numel(), product.dtype
    gate, up = gate.detach(), up.detach()

    def pack(tensor: torch.Tensor) -> tuple[torch.Tensor | None, torch.Size]:
        same = (tensor.data_ptr(), tensor.numel(), tensor.dtype) == (address, count, dtype)
        return (None if same and tensor.is_contiguous() else tensor), tensor.shape

    def unpack(saved: tuple[torch.Tensor | None, torch.Size]) -> torch.Tensor:
        tensor, shape = saved
        return (activation.of(gate)[1].detach() * up).view(shape) if tensor is None else tensor

    with saved_tensors_hooks(pack, unpack):
        return mlp.down_proj(product)


def patch_norms(model: nn.Module) -> int:
    """Patch norms that compute exactly what `RMSNorm` does to save less; returns their number."""
    norms = [module for module in model.modules() if _eps(module) is not None and not vars(module).get("forward")]
    alike = [norm for norm in norms if [(n, p.ndim) for n, p in norm.named_parameters()] == [("weight", 1)]]
    # A streamed block's weights are empty, and prove nothing: the largest norm of its settings speaks for all.
    largest = {_settings(norm): norm for norm in sorted(alike, key=lambda norm: norm.get_parameter("weight").numel())}
    equal = {key: _is_rms_norm(norm) for key, norm in largest.items()}
    chosen = [norm for norm in alike if equal[_settings(norm)]]
    for norm in chosen:
        vars(norm)["forward"] = partial(_norm_forward, norm, _eps(norm))
    return len(chosen)


def patch_mlps(model: nn.Module) -> int:
    """Patch gated MLPs to save only the outputs of their first two layers; returns their number.

    Not for activation checkpointing, which saves less, and whose hooks this would replace.
    """
    alike = [module for module in model.modules() if {name for name, _ in module.named_children()} == set(PARTS)]
    gated = {kind: _is_gated(kind) for kind in {type(mlp) for mlp in alike}}
    # The gradients of an activation's own parameters would be lost.
    fixed = [mlp for mlp in alike if not any(True for _ in mlp.get_submodule("act_fn").parameters())]
    chosen = [mlp for mlp in fixed if gated[type(mlp)] and not vars(mlp).get("forward")]
    for mlp in chosen:
        vars(mlp)["forward"] = partial(_mlp_forward, cast(GatedMlp, mlp))
    return len(chosen)


def _eps(norm: nn.Module) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _settings(norm: nn.Module) -> tuple[object, ...]:
    """What tells norms apart that may compute differently: class, and attributes that are plain values."""
    plain = [(key, value) for key, value in vars(norm).items() if isinstance(value, str | int | float | None)]
    return type(norm), *sorted(plain, key=str)


def _is_rms_norm(norm: nn.Module) -> bool:
    """Whether a norm in training gives the bits of `RMSNorm`, and its gradients, with test weights for its own."""
    count, training = norm.get_parameter("weight").numel(), norm.training
    if not count:
        return False
    weight = torch.linspace(-2, 2, count)
    x = torch.linspace(-3, 5, 7 * count).view(7, count)
    pairs = [(x, weight), (x.bfloat16(), weight.bfloat16()), (x.bfloat16(), weight)]
    try:
        return all(_computes_the_same(norm.train(), x, weight) for x, weight in pairs)
    # A class of any library may refuse such a call in a way of its own.
    except Exception:
        return False
    finally:
        norm.train(training)


def _computes_the_same(norm: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> bool:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    outputs = functional_call(norm, {"weight": weight}, (x,)), _rms_norm(x, weight, _eps(norm))
    if not torch.equal(*outputs):
        return False
    ours, expected = (torch.autograd.grad(out.float().pow(2).sum(), (x, weight)) for out in outputs)
    tolerance = 1e-4 if x.dtype == torch.float32 else 2e-2
    return all(bool((a - b).norm() <= tolerance * b.norm()) for a, b in zip(ours, expected, strict=True))


def _is_gated(kind: type[nn.Module]) -> bool:
    """Whether a class's forward is down(act(gate(x)) * up(x)), tried on parts that are simple functions."""
    mlp = SimpleNamespace(
        gate_proj=lambda x: x - 1, up_proj=lambda x: 3 * x, down_proj=lambda x: x + 0.5, act_fn=torch.sigmoid
    )
    x = torch.linspace(-2, 2, 9)
    try:
        return torch.equal(kind.forward(mlp, x), torch.sigmoid(x - 1) * (3 * x) + 0.5)
    # It needs more than these parts, or other arguments.
    except Exception:
        return False
