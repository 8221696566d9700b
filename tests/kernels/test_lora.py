"""A LoRA layer as one operation: PEFT's outputs and gradients, and PEFT itself wherever a layer is more than that."""

import copy
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn

from llmtune.kernels.cpu.lora import FusedLora, patch_lora
from tests.support import tiny


def layer(bias: bool = True, dtype: torch.dtype = torch.float32, packed: bool = False, **more: Any) -> Any:
    """A LoRA layer whose A and B are both random, over a linear one in `dtype` or in 4 bits that compute in it."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 40, bias=bias)).to(dtype)
    if packed:
        four = Linear4bit(24, 40, bias=bias, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
        four.load_state_dict(base[0].state_dict())
        base = nn.Sequential(four.to("cpu"))
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["0"], "init_lora_weights": False, **more}
    made = get_peft_model(base, LoraConfig(**settings)).base_model.model[0]
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return made


def whole(packed: Linear4bit) -> nn.Linear:
    """A linear layer with what 4 bits stand for."""
    made = nn.Linear(packed.in_features, packed.out_features)
    made.weight.data = dequantize_4bit(packed.weight.data, packed.weight.quant_state)
    made.bias.data = packed.bias.data
    return made


def run(made: Any, x: torch.Tensor, mixed: bool = False) -> list[torch.Tensor]:
    """Output and gradients of x, A and B."""
    made.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        out = made(x)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
    grads = [made.lora_A["default"].weight.grad, made.lora_B["default"].weight.grad]
    return [out.detach(), x.grad, *grads]


def pair(**more: Any) -> tuple[Any, Any]:
    plain = layer(**more)
    ours = copy.deepcopy(plain)
    assert patch_lora(ours) == 1
    return ours, plain


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "4bit"])
@pytest.mark.parametrize("bias", [True, False])
def test_in_fp32_it_is_pefts(bias: bool, packed: bool) -> None:
    x = torch.randn(3, 7, 24)
    for mine, other in zip(*(run(made, x) for made in pair(bias=bias, packed=packed)), strict=True):
        assert mine.dtype == other.dtype
        assert (mine - other).norm() <= 1e-6 * other.norm()
        # Elements of sums that nearly cancel carry the rounding of what was summed.
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "4bit"])
def test_in_bf16_it_is_as_near_to_exact_as_pefts(packed: bool) -> None:
    ours, plain = pair(dtype=torch.bfloat16, packed=packed)
    exact = copy.deepcopy(plain)
    if packed:
        exact.base_layer = whole(exact.base_layer)
    exact.double()
    errors = torch.zeros(4, 2, dtype=torch.float64)
    for _ in range(20):
        x = torch.randn(5, 9, 24).bfloat16()
        found = [run(ours, x, mixed=True), run(plain, x, mixed=True), run(exact, x.double())]
        for error, mine, other, true in zip(errors, *found, strict=True):
            assert mine.dtype == other.dtype
            error += torch.stack([(given.double() - true).square().sum() for given in (mine, other)])
    ours_error, pefts_error = errors.sqrt().unbind(1)
    assert (ours_error <= 1.05 * pefts_error).all()


@pytest.mark.parametrize("change", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}], ids=str)
def test_a_layer_that_does_more_is_left_to_peft(change: dict[str, Any]) -> None:
    made = layer(**change)
    assert patch_lora(made) == 0
    assert "forward" not in vars(made)


def test_a_base_in_4_bits_is_never_kept_whole() -> None:
    made, kept = layer(dtype=torch.bfloat16, packed=True), []
    assert patch_lora(made) == 1
    x = torch.randn(5, 24, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda kept: kept)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        made(x)
    assert kept
    assert (40, 24) not in kept


def test_a_4bit_base_on_its_side_is_left_to_peft() -> None:
    made = layer(packed=True)
    made.base_layer.weight.quant_state.shape = torch.Size((24, 40))
    assert patch_lora(made) == 0


def test_a_base_that_trains_or_is_no_linear_layer_is_left_to_peft() -> None:
    made = layer()
    made.base_layer.weight.requires_grad_(True)
    assert patch_lora(made) == 0
    model = get_peft_model(tiny.model("gpt2"), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    assert patch_lora(model) == 0


def test_a_disabled_or_merged_adapter_is_heeded() -> None:
    made, x = layer(), torch.randn(2, 24)
    assert patch_lora(made) == 1
    made.enable_adapters(False)
    assert torch.equal(made(x), made.base_layer(x))
    made.enable_adapters(True)
    apart = made(x)
    made.merge()
    torch.testing.assert_close(made(x), apart, rtol=1e-5, atol=1e-5)


def test_only_the_gradients_that_are_asked_for_are_made() -> None:
    x, base = torch.randn(3, 8), nn.Linear(8, 6, bias=False)
    down, up = torch.randn(2, 8, requires_grad=True), torch.randn(6, 2)
    FusedLora.apply(x, base, None, down, up, 1.0).sum().backward()
    assert down.grad is not None
    assert x.grad is None
    assert up.grad is None
