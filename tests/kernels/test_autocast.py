"""Linear layers that train under autocast: autocast's outputs and gradients, and neither weights nor copies kept."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from llmtune.kernels.cpu import autocast
from llmtune.kernels.cpu.autocast import patch_embedding, patch_linears
from tests.support import tiny


class Three(nn.Module):
    """Three layers over one input, as queries, keys and values are."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(24, width, bias=bias) for width in (16, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


def run(made: Any, x: torch.Tensor, mixed: bool = True) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        out = made(x * 1)  # autocast casts leaves once for all of their uses
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
    return [out.detach(), x.grad, *(parameter.grad for parameter in made.parameters())]


@pytest.mark.parametrize(
    ("dtype", "mixed"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)], ids=str
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_outputs_and_gradients_are_autocasts(bias: bool, dtype: torch.dtype, mixed: bool) -> None:
    plain = Three(bias)
    ours = copy.deepcopy(plain)
    assert patch_linears(ours) == 3
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    for _ in range(2):  # space is used again
        for mine, other in zip(run(ours, x, mixed), run(plain, x, mixed), strict=True):
            assert mine.dtype == other.dtype
            torch.testing.assert_close(mine, other, rtol=2**-8, atol=1e-6)
            assert (mine.double() - other.double()).norm() <= 1e-3 * other.double().norm()


def test_an_input_that_changed_is_cast_again() -> None:
    made, weight = nn.ModuleList([nn.Linear(4, 4, bias=False)]), torch.eye(4)
    made[0].weight.data.copy_(weight)
    patch_linears(made)
    x = torch.ones(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made[0](x).float(), x)
        x.mul_(2)
        assert torch.equal(made[0](x).float(), x)
        other = torch.zeros(2, 4).mul_(1)
        assert other._version == x._version
        assert torch.equal(made[0](other).float(), other)


def test_a_large_gradient_is_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = Three(bias=False), Three(bias=False)
    patch_linears(whole)
    patch_linears(parts)
    x = torch.randn(2, 7, 24)
    expected = run(whole, x)
    monkeypatch.setattr(autocast, "PART", 3 * 24 * 2)
    for mine, other in zip(run(parts, x), expected, strict=True):
        assert torch.equal(mine, other)


def test_one_copy_of_the_input_is_kept_and_no_cast_weight() -> None:
    made = Three(bias=False)
    patch_linears(made)
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(2, 7, 24).requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        made(x)
    weights = {parameter.data_ptr() for parameter in made.parameters()}
    assert [tensor.shape for place, tensor in found.items() if place not in weights] == [x.shape]


def test_frozen_layers_and_other_precisions_stay_as_they_are() -> None:
    made = nn.ModuleList([nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4)])
    assert patch_linears(made) == 1
    made[1].requires_grad_(False)
    x = torch.randn(3, 4).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        made[1](x).sum().backward()
    assert x.grad is not None
    assert made[1].weight.grad is None


def test_a_tied_embeddings_gradient_is_the_dense_ones() -> None:
    ids, grads = torch.tensor([[3, 4, 3, 5]]), []
    for sparse in (False, True):
        model = tiny.model("llama", blocks=1, tied=True)
        if sparse:
            assert patch_embedding(model)
        for _ in range(2):  # a step of two passes
            model(ids).logits.float().pow(2).sum().backward()
        grads.append(model.get_input_embeddings().weight.grad)
    assert not grads[1].is_sparse
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-6)


def test_an_embedding_of_its_own_keeps_a_dense_gradient() -> None:
    model = tiny.model("llama", blocks=1, tied=False)
    assert not patch_embedding(model)
    assert not model.get_input_embeddings().sparse
