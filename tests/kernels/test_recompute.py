"""RMS norms and gated MLPs that keep less: the same outputs bit for bit, the same gradients, and less kept."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from llmtune.kernels.cpu.recompute import patch_mlps, patch_norms
from tests.support import tiny

CASES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


def norm(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    made = LlamaRMSNorm(48, eps=1e-5)
    nn.init.normal_(made.weight)
    return made.to(dtype)


def mlp(dtype: torch.dtype = torch.float32, act: str = "silu") -> Any:
    torch.manual_seed(0)
    config = tiny.model().config
    config.hidden_act = act
    return LlamaMLP(config).to(dtype)


def run(made: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of the input and the weights."""
    x = x.clone().requires_grad_()
    out = made(x)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
    return [out.detach(), x.grad, *(parameter.grad for parameter in made.parameters())]


def kept(made: Any, x: torch.Tensor) -> int:
    """Bytes that a forward pass keeps beside input, output and weights."""
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = made(x)
    for known in (x, out, *made.parameters()):
        found.pop(known.untyped_storage().data_ptr(), None)
    return sum(found.values())


def near(ours: torch.Tensor, other: torch.Tensor, true: torch.Tensor) -> bool:
    """Whether ours is as near to the exact result as another one, give or take its last bits."""
    return bool((ours.double() - true).norm() <= 1.1 * (other.double() - true).norm() + 1e-7 * true.norm())


@pytest.mark.parametrize(("of_x", "of_weight"), CASES, ids=str)
def test_a_norm_gives_the_same_bits_and_gradients_as_near_to_exact(of_x: torch.dtype, of_weight: torch.dtype) -> None:
    plain = norm(of_weight)
    ours, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    # Only the class's own products are exact in double: it goes through fp32.
    exact.forward = lambda x: exact.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + exact.variance_epsilon)
    assert patch_norms(ours) == 1
    x = torch.randn(3, 7, 48).to(of_x)
    mine, other, true = run(ours, x), run(plain, x), run(exact, x.double())
    assert torch.equal(mine[0], other[0])
    for ours_, others_, exact_ in zip(mine[1:], other[1:], true[1:], strict=True):
        assert ours_.dtype == others_.dtype
        assert near(ours_, others_, exact_)
    if of_x == torch.bfloat16:
        assert kept(ours, x) < kept(plain, x) / 4


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gated_mlp_gives_the_same_bits_and_keeps_half(dtype: torch.dtype, act: str) -> None:
    plain = mlp(dtype, act)
    ours = copy.deepcopy(plain)
    assert patch_mlps(ours) == 1
    x = torch.randn(2, 5, plain.hidden_size).to(dtype)
    for mine, other in zip(run(ours, x), run(plain, x), strict=True):
        assert torch.equal(mine, other)
    assert kept(ours, x) <= kept(plain, x) * 2 / 3


def test_a_gated_mlp_computes_again_what_its_last_layer_kept() -> None:
    ours = mlp()
    act = ours.act_fn = Counted()
    assert patch_mlps(ours) == 1
    x = torch.randn(2, 5, ours.hidden_size)
    out = ours(x.requires_grad_())
    assert act.calls == 1
    out.sum().backward()
    assert act.calls == 3


class Counted(nn.Module):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.nn.functional.silu(x)


def test_norms_and_mlps_of_another_form_stay_as_they_are() -> None:
    class Other(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    class Before(LlamaRMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = x.float()
            return (self.weight * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(
                x.dtype
            )

    model = nn.ModuleList([Other(tiny.model().config), Before(8), Gemma3RMSNorm(8), nn.LayerNorm(8)])
    assert patch_norms(model) == patch_mlps(model) == 0
    assert not any("forward" in vars(module) for module in model)


@pytest.mark.parametrize(("kind", "norms", "mlps"), [("llama", 5, 2), ("qwen3", 9, 2), ("gpt2", 0, 0), ("opt", 0, 0)])
def test_what_is_found_in_an_architecture(kind: str, norms: int, mlps: int) -> None:
    model = tiny.model(kind, blocks=2)
    assert (patch_norms(model), patch_mlps(model)) == (norms, mlps)
    assert (patch_norms(model), patch_mlps(model)) == (0, 0), "once is enough"
