"""Linear layers that train under autocast: autocast's outputs and gradients, with no cast weight and one cast input."""

import copy

import pytest
import torch
from torch import nn

from llmtune.kernels.cpu import autocast
from llmtune.kernels.cpu.autocast import PendingGradients, patch_embedding, patch_linears
from llmtune.kernels.cpu.copies import WeightCopies
from tests.support import tiny
from tests.support.layers import relative_error, run_layer, saved_tensors


class ThreeLayers(nn.Module):
    """Three layers over one input, as queries, keys and values are."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(24, width, bias=bias) for width in (16, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


@pytest.mark.parametrize(
    ("dtype", "mixed"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)], ids=str
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_matches_autocast_outputs_and_gradients(bias: bool, dtype: torch.dtype, mixed: bool) -> None:
    default = ThreeLayers(bias)
    ours = copy.deepcopy(default)
    assert patch_linears(ours) == 3
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    for _ in range(2):  # buffers are used again
        for mine, other in zip(run_layer(ours, x, mixed), run_layer(default, x, mixed), strict=True):
            assert mine.dtype == other.dtype
            torch.testing.assert_close(mine, other, rtol=2**-8, atol=1e-6)
            assert relative_error(mine, other) <= 1e-3


def test_casts_a_changed_input_again() -> None:
    layer, weight = nn.Linear(4, 4, bias=False), torch.eye(4)
    layer.weight.data.copy_(weight)
    patch_linears(layer)
    x = torch.ones(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x).float(), x)
        x.mul_(2)
        assert torch.equal(layer(x).float(), x)
        other = torch.zeros(2, 4).mul_(1)
        assert other._version == x._version
        assert torch.equal(layer(other).float(), other)


def test_keeps_the_bits_of_a_large_gradient_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, in_parts = ThreeLayers(bias=False), ThreeLayers(bias=False)
    patch_linears(at_once)
    patch_linears(in_parts)
    x = torch.randn(2, 7, 24)
    expected = run_layer(at_once, x, mixed=True)
    monkeypatch.setattr(autocast, "MAX_PART_BYTES", 3 * 24 * 2)
    for mine, other in zip(run_layer(in_parts, x, mixed=True), expected, strict=True):
        assert torch.equal(mine, other)


def test_saves_one_copy_of_the_input_and_no_cast_weight() -> None:
    layers = ThreeLayers(bias=False)
    patch_linears(layers)
    x = torch.randn(2, 7, 24).requires_grad_()
    assert [(saved.shape, saved.dtype) for saved in saved_tensors(layers, x, mixed=True)] == [(x.shape, torch.bfloat16)]


def test_casts_a_weight_once_a_step_or_where_it_changed_in_it() -> None:
    layer, copies = nn.Linear(5, 3, bias=False), WeightCopies()
    patch_linears(layer, copies=copies)
    weight = layer.weight

    def is_current() -> bool:
        copy = copies.get(weight, torch.bfloat16)
        return copy is not None and torch.equal(copy, weight.bfloat16())

    assert copies.get(weight, torch.bfloat16) is None, "before the first step"
    copies.begin_step()
    assert is_current()
    weight.data.add_(1)
    assert not is_current(), "nothing tells of a change through .data; a step begins after it"
    copies.begin_step()
    assert is_current()
    for change in (lambda: weight.add_(1), lambda: setattr(weight, "data", torch.ones(3, 5))):
        with torch.no_grad():
            change()
        assert is_current()
    assert copies.get(weight, torch.float16) is None
    weight.requires_grad_(False)
    copies.begin_step()
    assert copies.get(weight, torch.bfloat16) is None


def test_leaves_frozen_layers_and_other_precisions_alone() -> None:
    layers = nn.ModuleList([nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4)])
    assert patch_linears(layers) == 1
    layers[1].requires_grad_(False)
    x = torch.randn(3, 4).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        layers[1](x).sum().backward()
    assert x.grad is not None
    assert layers[1].weight.grad is None


def test_pending_gradients_are_added_once() -> None:
    pending, weight = PendingGradients(), torch.zeros(2, 2)
    pending.add(weight, torch.ones(2, 2).bfloat16())
    pending.add(weight, torch.ones(2, 2).bfloat16())
    assert weight.grad is None
    pending.flush()
    pending.flush()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad, torch.full((2, 2), 2.0))


def test_gives_a_tied_embedding_the_dense_gradient() -> None:
    ids, gradients = torch.tensor([[3, 4, 3, 5]]), []
    for sparse in (False, True):
        model = tiny.model("llama", blocks=1, tied=True)
        if sparse:
            assert patch_embedding(model)
        for _ in range(2):  # a step of two passes
            model(ids).logits.float().pow(2).sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert not gradients[1].is_sparse
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-6)


def test_keeps_a_dense_gradient_for_an_untied_embedding() -> None:
    model = tiny.model("llama", blocks=1, tied=False)
    assert not patch_embedding(model)
    assert not model.get_input_embeddings().sparse
