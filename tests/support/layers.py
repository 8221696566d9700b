"""One pass forward and backward through a layer: its results, and what it saves between the two."""

import torch
from torch import nn


def run_layer(layer: nn.Module, x: torch.Tensor, mixed: bool = False) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of each parameter that has one; under bf16 autocast if `mixed`."""
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        out = layer(leaf * 1)  # a leaf is cast by autocast once for all of its uses
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
    gradients = [leaf.grad, *(parameter.grad for parameter in layer.parameters())]
    return [out.detach(), *(gradient for gradient in gradients if gradient is not None)]


def saved_tensors(layer: nn.Module, x: torch.Tensor, mixed: bool = False) -> list[torch.Tensor]:
    """The tensors that a forward pass saves for backward, one per memory, without parameters and the output."""
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        out = layer(x)
    for known in (out, *layer.parameters()):
        saved.pop(known.untyped_storage().data_ptr(), None)
    return list(saved.values())


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, as a share of the expected norm."""
    return float((ours.double() - expected.double()).norm() / expected.double().norm())
