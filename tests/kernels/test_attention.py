"""Attention over short rows: equal to transformers' own in fp32, as accurate in bf16, and the default elsewhere."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from llmtune.kernels.attention import row_attention
from llmtune.kernels.cpu.attention import SHORT
from llmtune.kernels.rows import JoinedRows
from tests.support.layers import relative_error


class CausalAttention(torch.nn.Module):
    """As much of an attention layer as the default reads."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def attend(
    tensors: list[torch.Tensor], mask: torch.Tensor | None, ours: bool, mixed: bool = False, **options: float | None
) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value; `tensors` ends with the output's gradient."""
    query, key, value, of_out = (tensor.clone().requires_grad_() for tensor in tensors)
    module = CausalAttention(query.shape[1] // key.shape[1])
    with row_attention() if ours else nullcontext(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        out = AttentionInterface()["sdpa"](module, query, key, value, mask, **options)[0]
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), of_out)]


def batch(
    tokens: int = 33, heads: int = 6, shared: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key, value and the output's gradient for three rows of different lengths, and their causal mask."""
    torch.manual_seed(0)
    shapes = [(3, heads, tokens, 16), (3, shared, tokens, 16), (3, shared, tokens, 16), (3, tokens, heads, 16)]
    real = torch.arange(tokens) < torch.tensor([tokens, tokens - 5, tokens - 20])[:, None]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() & real[:, None, None, :]
    return [torch.randn(shape).to(dtype) for shape in shapes], mask


@pytest.mark.parametrize("shared", [1, 2, 6])
@pytest.mark.parametrize("scaling", [None, 0.5])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_matches_default_output_and_gradients_in_fp32(shared: int, scaling: float | None, kind: str) -> None:
    tensors, mask = batch(shared=shared)
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    ours, default = (attend(tensors, mask, flag, scaling=scaling) for flag in (True, False))
    assert all(relative_error(mine, other) <= 2e-6 for mine, other in zip(ours, default, strict=True))
    assert any(not torch.equal(mine, other) for mine, other in zip(ours, default, strict=True)), "the default ran"


@pytest.mark.parametrize("mixed", [False, True], ids=["bf16", "autocast"])
def test_is_as_accurate_as_the_default_in_bf16(mixed: bool) -> None:
    tensors, mask = batch(tokens=96, dtype=torch.bfloat16)
    tensors[0] *= 4
    exact = attend([tensor.double() for tensor in tensors], mask, ours=False)
    ours, default = (attend(tensors, mask, flag, mixed) for flag in (True, False))
    for mine, other, true in zip(ours, default, exact, strict=True):
        assert relative_error(mine, true) <= 1.3 * relative_error(other, true)


@pytest.mark.parametrize(
    "change", [{"dropout": 0.5}, {"tokens": SHORT + 1}, {"dtype": torch.float64}, {"mask": None}], ids=str
)
def test_leaves_other_inputs_to_the_default(change: dict[str, Any]) -> None:
    (query, key, value, _), mask = batch(**{name: change[name] for name in ("tokens", "dtype") if name in change})
    queries: list[torch.Tensor] = []
    default = AttentionInterface()["sdpa"]

    def record(module: torch.nn.Module, query: torch.Tensor, *rest: object, **options: object) -> Any:
        queries.append(query)
        return query, None

    AttentionInterface.register("sdpa", record)
    try:
        with row_attention() as router:
            router(torch.nn.Module(), query, key, value, change.get("mask", mask), dropout=change.get("dropout", 0.0))
    finally:
        AttentionInterface.register("sdpa", default)
    assert len(queries) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_isolates_joined_rows_from_each_other(dtype: torch.dtype) -> None:
    tensors, _ = batch(dtype=dtype)
    rows = JoinedRows([33, 28, 13], 33, masked=True)
    count = rows.tokens
    joined = [rows.joined(tensor.transpose(1, 2)).transpose(1, 2) for tensor in tensors[:3]] + [rows.joined(tensors[3])]
    joined[3][:, count:] = 0
    owner = rows.joined(torch.arange(3)[:, None].expand(3, 33))[0].index_fill(0, torch.tensor(count), 3)
    own = ((owner[:, None] == owner) & torch.ones(rows.length, rows.length, dtype=torch.bool).tril())[None, None]
    default = attend(joined, own, ours=False)
    query, key, value = (tensor.clone().requires_grad_() for tensor in joined[:3])
    with row_attention() as router, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        router.rows = rows
        out = router(torch.nn.Module(), query, key, value, own)[0]
    gradients = torch.autograd.grad(out, (query, key, value), joined[3])
    allowed = 2e-6 if dtype == torch.float32 else 1e-2
    assert relative_error(out[:, :count].detach(), default[0][:, :count]) <= allowed
    assert all(relative_error(mine, other) <= allowed for mine, other in zip(gradients, default[1:], strict=True))


def test_joins_rows_in_order_and_ends_with_a_filler() -> None:
    ids = torch.tensor([[7, 8, 0, 0], [1, 2, 3, 4]])
    rows = JoinedRows([2, 4], 4)
    assert rows.joined(ids).tolist() == [[7, 8, 1, 2, 3, 4, 7]]
    assert rows.joined(torch.arange(4).expand_as(ids)).tolist() == [[0, 1, 0, 1, 2, 3, 0]]
    assert rows.places(torch.tensor([0, 1]), torch.tensor([1, 3])).tolist() == [1, 5]


def test_restores_the_default_after_an_error() -> None:
    default = AttentionInterface()["sdpa"]
    with pytest.raises(KeyError), row_attention():
        raise KeyError
    assert AttentionInterface()["sdpa"] is default
