"""Attention over short rows: equal to transformers' own in fp32, as near to it in bf16, and left alone elsewhere."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmtune.kernels.cpu.attention import SHORT, JoinedRows, short_row_attention
from llmtune.train.joined import arguments


def attend(tensors: Any, mask: Any, ours: bool, mixed: bool = False, **more: Any) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value."""
    query, key, value, given = (tensor.clone().requires_grad_() for tensor in tensors)
    module = torch.nn.Module()
    module.num_key_value_groups = query.shape[1] // key.shape[1]
    module.is_causal = True
    with short_row_attention() if ours else nullcontext(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        out = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **more)[0]
    out.backward(given)
    return [out.detach(), query.grad, key.grad, value.grad]


def batch(tokens: int = 33, heads: int = 6, shared: int = 2, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    shapes = [(3, heads, tokens, 16), (3, shared, tokens, 16), (3, shared, tokens, 16), (3, tokens, heads, 16)]
    real = torch.arange(tokens) < torch.tensor([tokens, tokens - 5, tokens - 20])[:, None]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() & real[:, None, None, :]
    return [torch.randn(shape).to(dtype) for shape in shapes], mask


def gap(ours: torch.Tensor, plain: torch.Tensor) -> float:
    return float((ours.double() - plain.double()).norm() / plain.double().norm())


@pytest.mark.parametrize("shared", [1, 2, 6])
@pytest.mark.parametrize("scaling", [None, 0.5])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_in_fp32_output_and_gradients_are_the_defaults(shared: int, scaling: float | None, kind: str) -> None:
    tensors, mask = batch(shared=shared)
    given = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    ours, plain = (attend(tensors, given, flag, scaling=scaling) for flag in (True, False))
    for mine, other in zip(ours, plain, strict=True):
        assert gap(mine.detach(), other) <= 2e-6
    assert any(not torch.equal(mine, other) for mine, other in zip(ours, plain, strict=True)), "the default ran"


@pytest.mark.parametrize("mixed", [False, True], ids=["bf16", "autocast"])
def test_in_bf16_it_is_as_near_to_exact_as_the_default(mixed: bool) -> None:
    tensors, mask = batch(tokens=96, dtype=torch.bfloat16)
    tensors[0] *= 4
    exact = attend([tensor.double() for tensor in tensors], mask, ours=False)
    ours, plain = (attend(tensors, mask, flag, mixed) for flag in (True, False))
    for mine, other, true in zip(ours, plain, exact, strict=True):
        assert gap(mine, true) <= 1.3 * gap(other, true)


@pytest.mark.parametrize(
    "more", [{"dropout": 0.5}, {"tokens": SHORT + 1}, {"dtype": torch.float64}, {"mask": None}], ids=str
)
def test_what_it_is_not_made_for_goes_to_the_default(more: dict[str, Any]) -> None:
    sizes = {name: more[name] for name in ("tokens", "dtype") if name in more}
    tensors, mask = batch(**sizes)
    called: list[torch.Tensor] = []
    default = ALL_ATTENTION_FUNCTIONS["sdpa"]
    AttentionInterface.register("sdpa", lambda *arguments, **named: called.append(arguments[1]) or (arguments[1], None))
    try:
        with short_row_attention() as chooser:
            chooser(None, *tensors[:3], None if "mask" in more else mask, dropout=more.get("dropout", 0.0))
    finally:
        AttentionInterface.register("sdpa", default)
    assert len(called) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_joined_attend_to_themselves_alone(dtype: torch.dtype) -> None:
    tensors, mask = batch(dtype=dtype)
    real = mask[:, 0, -1]
    rows = JoinedRows(real)
    count = rows.tokens
    joined = [rows.joined(tensor.transpose(1, 2)).transpose(1, 2) for tensor in tensors[:3]] + [rows.joined(tensors[3])]
    joined[3][:, count:] = 0
    owner = rows.joined(torch.arange(3)[:, None].expand(3, 33))[0].index_fill(0, torch.tensor(count), 3)
    own = (owner[:, None] == owner) & torch.ones(rows.length, rows.length, dtype=torch.bool).tril()
    plain = attend(joined, own[None, None], ours=False)
    query, key, value = (tensor.clone().requires_grad_() for tensor in joined[:3])
    with short_row_attention() as chooser, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        chooser.rows = rows
        out = chooser(torch.nn.Module(), query, key, value, own[None, None])[0]
    out.backward(joined[3])
    assert gap(out[:, :count].detach(), plain[0][:, :count]) <= (2e-6 if dtype == torch.float32 else 1e-2)
    for mine, other in zip([query.grad, key.grad, value.grad], plain[1:], strict=True):
        assert gap(mine, other) <= (2e-6 if dtype == torch.float32 else 1e-2)


def test_positions_of_joined_rows_and_of_the_filler_start_anew() -> None:
    ids = torch.tensor([[7, 8, 0, 0], [1, 2, 3, 4]])
    made = arguments(ids, JoinedRows(ids > 0))
    assert made["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3, 0]]
    assert made["input_ids"].tolist() == [[7, 8, 1, 2, 3, 4, 7]]


def test_the_default_is_back_afterwards_whatever_happens() -> None:
    default = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(KeyError), short_row_attention():
        raise KeyError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is default
