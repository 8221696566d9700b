"""RMS norms and gated MLPs that save less: the same outputs bit for bit, as accurate gradients, less saved."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from llmtune.kernels.recompute import patch_mlps, patch_norms
from tests.support import tiny
from tests.support.layers import run_layer, saved_tensors

CASES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


class ExactNorm(LlamaRMSNorm):
    """A norm that is exact in double; the class itself goes through fp32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class CountedSiLU(nn.Module):
    """SiLU that counts its calls."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.nn.functional.silu(x)


def norm(dtype: torch.dtype) -> LlamaRMSNorm:
    """A norm with random weights."""
    torch.manual_seed(0)
    layer = LlamaRMSNorm(48, eps=1e-5)
    nn.init.normal_(layer.weight)
    return layer.to(dtype)


def mlp(dtype: torch.dtype = torch.float32, act: str = "silu") -> LlamaMLP:
    """A gated MLP with random weights."""
    torch.manual_seed(0)
    config = tiny.model().config
    config.hidden_act = act
    return LlamaMLP(config).to(dtype)


def saved_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a forward pass saves beside input, output and weights."""
    x = x.clone().requires_grad_()
    saved = {tensor.untyped_storage().data_ptr(): tensor for tensor in saved_tensors(layer, x)}
    saved.pop(x.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def is_as_accurate(ours: torch.Tensor, other: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether ours is as near to the exact result as the other one, give or take its last bits."""
    return bool((ours.double() - exact).norm() <= 1.1 * (other.double() - exact).norm() + 1e-7 * exact.norm())


@pytest.mark.parametrize(("of_x", "of_weight"), CASES, ids=str)
def test_norm_has_the_same_bits_and_as_accurate_gradients(of_x: torch.dtype, of_weight: torch.dtype) -> None:
    default = norm(of_weight)
    ours, exact = copy.deepcopy(default), copy.deepcopy(default).double()
    exact.__class__ = ExactNorm
    assert patch_norms(ours) == 1
    x = torch.randn(3, 7, 48).to(of_x)
    mine, other, true = run_layer(ours, x), run_layer(default, x), run_layer(exact, x.double())
    assert torch.equal(mine[0], other[0])
    for our_gradient, other_gradient, exact_gradient in zip(mine[1:], other[1:], true[1:], strict=True):
        assert our_gradient.dtype == other_gradient.dtype
        assert is_as_accurate(our_gradient, other_gradient, exact_gradient)
    if of_x == torch.bfloat16:
        assert saved_bytes(ours, x) < saved_bytes(default, x) / 4


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gated_mlp_has_the_same_bits_and_saves_less(dtype: torch.dtype, act: str) -> None:
    default = mlp(dtype, act)
    ours = copy.deepcopy(default)
    assert patch_mlps(ours) == 1
    x = torch.randn(2, 5, default.hidden_size).to(dtype)
    for mine, other in zip(run_layer(ours, x), run_layer(default, x), strict=True):
        assert torch.equal(mine, other)
    assert saved_bytes(ours, x) <= saved_bytes(default, x) * 2 / 3


def test_gated_mlp_recomputes_the_input_of_its_last_layer() -> None:
    ours = mlp()
    act = ours.act_fn = CountedSiLU()
    assert patch_mlps(ours) == 1
    x = torch.randn(2, 5, ours.hidden_size)
    out = ours(x.requires_grad_())
    assert act.calls == 1
    out.sum().backward()
    assert act.calls == 2


def test_leaves_norms_and_mlps_of_another_form_alone() -> None:
    class Swapped(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    class WeightFirst(LlamaRMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = x.float()
            return (self.weight * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(
                x.dtype
            )

    model = nn.ModuleList([Swapped(tiny.model().config), WeightFirst(8), Gemma3RMSNorm(8), nn.LayerNorm(8)])
    assert patch_norms(model) == patch_mlps(model) == 0
    assert not any("forward" in vars(module) for module in model)


@pytest.mark.parametrize(("kind", "norms", "mlps"), [("llama", 5, 2), ("qwen3", 9, 2), ("gpt2", 0, 0), ("opt", 0, 0)])
def test_patches_each_layer_of_an_architecture_once(kind: str, norms: int, mlps: int) -> None:
    model = tiny.model(kind, blocks=2)
    assert (patch_norms(model), patch_mlps(model)) == (norms, mlps)
    assert (patch_norms(model), patch_mlps(model)) == (0, 0)
