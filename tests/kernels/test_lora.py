"""LoRA layers as one function: PEFT's outputs and gradients, and PEFT itself wherever a layer does more."""

import copy
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from llmtune.kernels.lora import FusedLora, patch_lora
from tests.support import tiny
from tests.support.layers import relative_error, run_layer, saved_tensors


def lora_layer(
    bias: bool = True, dtype: torch.dtype = torch.float32, in_4bit: bool = False, **options: object
) -> LoraLayer:
    """A LoRA layer whose A and B are both random, over a linear one in `dtype` or in 4 bits that compute in it."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 40, bias=bias)).to(dtype)
    if in_4bit:
        quantized = Linear4bit(24, 40, bias=bias, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
        quantized.load_state_dict(base[0].state_dict())
        base = nn.Sequential(quantized.to("cpu"))
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["0"], "init_lora_weights": False, **options}
    layer = get_peft_model(base, LoraConfig(**settings)).base_model.model[0]
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return layer


def dequantized(layer: Linear4bit) -> nn.Linear:
    """A linear layer with the weights that 4 bits stand for."""
    linear = nn.Linear(layer.in_features, layer.out_features)
    linear.weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    linear.bias.data = layer.bias.data
    return linear.requires_grad_(False)


def patched_and_pefts(**options: Any) -> tuple[LoraLayer, LoraLayer]:
    """Two equal layers, the first of them patched."""
    pefts = lora_layer(**options)
    ours = copy.deepcopy(pefts)
    assert patch_lora(ours) == 1
    return ours, pefts


@pytest.mark.parametrize("in_4bit", [False, True], ids=["plain", "4bit"])
@pytest.mark.parametrize("bias", [True, False])
def test_matches_peft_in_fp32(bias: bool, in_4bit: bool) -> None:
    x = torch.randn(3, 7, 24)
    ours, pefts = patched_and_pefts(bias=bias, in_4bit=in_4bit)
    results = run_layer(ours, x), run_layer(pefts, x)
    assert len(results[0]) == 4, "the output and the gradients of x, A and B"
    for mine, other in zip(*results, strict=True):
        assert mine.dtype == other.dtype
        assert relative_error(mine, other) <= 1e-6
        # Elements of sums that nearly cancel carry the rounding of what was summed.
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize("in_4bit", [False, True], ids=["plain", "4bit"])
def test_is_as_accurate_as_peft_in_bf16(in_4bit: bool) -> None:
    ours, pefts = patched_and_pefts(dtype=torch.bfloat16, in_4bit=in_4bit)
    exact = copy.deepcopy(pefts)
    if in_4bit:
        exact.base_layer = dequantized(exact.base_layer)
    exact.double()
    errors = torch.zeros(4, 2, dtype=torch.float64)
    for _ in range(20):
        x = torch.randn(5, 9, 24).bfloat16()
        results = [run_layer(ours, x, mixed=True), run_layer(pefts, x, mixed=True), run_layer(exact, x.double())]
        for error, mine, other, true in zip(errors, *results, strict=True):
            assert mine.dtype == other.dtype
            error += torch.stack([(result.double() - true).square().sum() for result in (mine, other)])
    ours_error, pefts_error = errors.sqrt().unbind(1)
    assert (ours_error <= 1.05 * pefts_error).all()


@pytest.mark.parametrize("change", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}], ids=str)
def test_leaves_a_layer_that_does_more_to_peft(change: dict[str, Any]) -> None:
    layer = lora_layer(**change)
    assert patch_lora(layer) == 0
    assert "forward" not in vars(layer)


def test_saves_no_dequantized_weight() -> None:
    layer = lora_layer(dtype=torch.bfloat16, in_4bit=True)
    assert patch_lora(layer) == 1
    shapes = [saved.shape for saved in saved_tensors(layer, torch.randn(5, 24, requires_grad=True), mixed=True)]
    assert shapes
    assert not {(40, 24), (24, 40)} & set(shapes)


def test_leaves_a_transposed_4bit_base_to_peft() -> None:
    layer = lora_layer(in_4bit=True)
    layer.base_layer.weight.quant_state.shape = torch.Size((24, 40))
    assert patch_lora(layer) == 0


def test_leaves_a_base_that_trains_or_is_not_linear_to_peft() -> None:
    layer = lora_layer()
    layer.base_layer.weight.requires_grad_(True)
    assert patch_lora(layer) == 0
    model = get_peft_model(tiny.model("gpt2"), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    assert patch_lora(model) == 0


def test_obeys_a_disabled_or_merged_adapter() -> None:
    layer, x = lora_layer(), torch.randn(2, 24)
    assert patch_lora(layer) == 1
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    unmerged = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), unmerged, rtol=1e-5, atol=1e-5)


def test_computes_only_the_gradients_that_are_needed() -> None:
    x, base = torch.randn(3, 8), nn.Linear(8, 6, bias=False)
    down, up = torch.randn(2, 8, requires_grad=True), torch.randn(6, 2)
    out: torch.Tensor = FusedLora.apply(x, base, None, down, up, 1.0)  # type: ignore[no-untyped-call]
    torch.autograd.backward(out.sum())
    assert down.grad is not None
    assert x.grad is None
    assert up.grad is None
