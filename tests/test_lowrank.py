"""A LoRA layer as one operation: PEFT's outputs and gradients, and PEFT itself wherever a layer is more than that."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from llmtune.lowrank import LowRank, one_operation
from tests import tiny


def layer(bias: bool = True, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A LoRA layer whose A and B are both random."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 40, bias=bias)).to(dtype)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["0"], "init_lora_weights": False, **more}
    made = get_peft_model(base, LoraConfig(**settings)).base_model.model[0]
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return made


def run(made: Any, x: torch.Tensor, mixed: bool = False) -> list[torch.Tensor]:
    """Output and gradients of x, A and B."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        out = made(x)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
    grads = [made.lora_A["default"].weight.grad, made.lora_B["default"].weight.grad]
    return [out.detach(), x.grad, *grads]


def pair(**more: Any) -> tuple[Any, Any]:
    plain = layer(**more)
    ours = copy.deepcopy(plain)
    assert one_operation(ours) == 1
    return ours, plain


@pytest.mark.parametrize("bias", [True, False])
def test_in_fp32_it_is_pefts(bias: bool) -> None:
    x = torch.randn(3, 7, 24)
    for mine, other in zip(*(run(made, x) for made in pair(bias=bias)), strict=True):
        assert mine.dtype == other.dtype
        assert (mine - other).norm() <= 1e-6 * other.norm()
        # Elements of sums that nearly cancel carry the rounding of what was summed.
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


def test_in_bf16_it_is_as_near_to_exact_as_pefts() -> None:
    ours, plain = pair(dtype=torch.bfloat16)
    exact = copy.deepcopy(plain).double()
    x = torch.randn(5, 9, 24).bfloat16()
    truth = run(exact, x.double())
    for mine, other, true in zip(run(ours, x, mixed=True), run(plain, x, mixed=True), truth, strict=True):
        assert mine.dtype == other.dtype
        assert (mine.double() - true).norm() <= 1.05 * (other.double() - true).norm()


@pytest.mark.parametrize("change", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}], ids=str)
def test_a_layer_that_does_more_is_left_to_peft(change: dict[str, Any]) -> None:
    made = layer(**change)
    assert one_operation(made) == 0
    assert "forward" not in vars(made)


def test_a_base_that_trains_or_is_packed_is_left_to_peft() -> None:
    made = layer()
    made.base_layer.weight.requires_grad_(True)
    assert one_operation(made) == 0
    model = get_peft_model(tiny.model("gpt2"), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    assert one_operation(model) == 0


def test_a_disabled_or_merged_adapter_is_heeded() -> None:
    made, x = layer(), torch.randn(2, 24)
    assert one_operation(made) == 1
    made.enable_adapters(False)
    assert torch.equal(made(x), made.base_layer(x))
    made.enable_adapters(True)
    apart = made(x)
    made.merge()
    torch.testing.assert_close(made(x), apart, rtol=1e-5, atol=1e-5)


def test_only_the_gradients_that_are_asked_for_are_made() -> None:
    x, weight = torch.randn(3, 8), torch.randn(6, 8)
    down, up = torch.randn(2, 8, requires_grad=True), torch.randn(6, 2)
    LowRank.apply(x, weight, None, down, up, 1.0).sum().backward()
    assert down.grad is not None
    assert x.grad is None
    assert up.grad is None
