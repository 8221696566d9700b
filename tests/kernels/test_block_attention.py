"""Attention over long rows on CPUs: as near to attention in fp64 as torch's own, with windows and with joined rows."""

from importlib import import_module
from typing import Any

import pytest
import torch
from torch.nn import functional

from llmtune.kernels import attention, varlen
from llmtune.kernels.cpu import block_attention
from llmtune.kernels.cpu.attention import LONG
from llmtune.kernels.cpu.blocks import QUERIES
from llmtune.kernels.rows import JoinedRows
from tests.kernels.test_attention import CausalAttention

Tensors = list[torch.Tensor]
LENGTHS = (1, 127, 128, 129, 300, 511, 700)


def tensors(tokens: int, heads: int, shared: int, dtype: torch.dtype) -> Tensors:
    """Query, key and value of two rows, and the output's gradient."""
    torch.manual_seed(tokens)
    made = [torch.randn(2, tokens, count, 16).to(dtype) for count in (heads, shared, shared, heads)]
    return [*(tensor.transpose(1, 2) for tensor in made[:3]), made[3]]


def results(attend: Any, given: Tensors) -> Tensors:
    """The output and the gradients of query, key and value."""
    query, key, value = (tensor.detach().requires_grad_() for tensor in given[:3])
    out = attend(query, key, value)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), given[3])]


def plain(given: Tensors, window: int | None, dtype: torch.dtype) -> Tensors:
    """What torch's own attention gives in a precision."""
    tokens, group = given[0].shape[2], given[0].shape[1] // given[1].shape[1]
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    seen = seen if window is None else seen.triu(1 - window)

    def attend(query: torch.Tensor, *shared: torch.Tensor) -> torch.Tensor:
        key, value = (tensor.repeat_interleave(group, 1) for tensor in shared)
        return functional.scaled_dot_product_attention(query, key, value, seen).transpose(1, 2)

    return results(attend, [tensor.to(dtype) for tensor in given])


def blockwise(given: Tensors, window: int | None) -> Tensors:
    """What `BlockAttention` gives."""
    spans = [block_attention.Span(row, 0, given[0].shape[2]) for row in range(2)]
    return results(lambda *heads: block_attention.apply(*heads, spans, 0.25, window), given)


def gaps(ours: Tensors, exact: Tensors) -> list[float]:
    """How far tensors are from exact ones, relative to these or, where they are zero, to one."""
    pairs = zip(ours, exact, strict=True)
    return [float((mine.double() - true).norm() / true.norm().clamp_min(1)) for mine, true in pairs]


@pytest.mark.parametrize(("heads", "shared", "window"), [(4, 2, None), (2, 2, 50), (3, 1, 200)])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_outputs_and_gradients_are_as_near_to_exact_ones_as_torchs(
    tokens: int, heads: int, shared: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_attention, "STACKED", heads // shared * QUERIES)
    for dtype, least in ((torch.float32, 2e-6), (torch.bfloat16, 1e-4)):
        given = tensors(tokens, heads, shared, dtype)
        exact = plain(given, window, torch.float64)
        torchs = gaps(plain(given, window, dtype), exact)
        for kept in (0, 1024):
            monkeypatch.setattr(block_attention, "KEPT", kept)
            ours = gaps(blockwise(given, window), exact)
            assert all(mine <= max(1.3 * other, least) for mine, other in zip(ours, torchs, strict=True))


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keeps_joined_rows_apart(dtype: torch.dtype, window: int | None) -> None:
    rows = JoinedRows([40, 300, 1, 129], 300)
    heads = [torch.randn(rows.length, count, 16).to(dtype) for count in (6, 2, 2)]
    of_out = torch.randn(rows.length, 6, 16)

    def taken(kernel: varlen.Kernel, dtype: torch.dtype) -> Tensors:
        query, key, value = (tensor.to(dtype).requires_grad_() for tensor in heads)
        out = kernel((query, key, value), rows, 0.3, window)
        return [out.detach(), *torch.autograd.grad(out, (query, key, value), of_out.to(dtype))]

    near = 2e-6 if dtype == torch.float32 else 1e-2
    exact = taken(varlen.row_by_row, torch.float64)
    assert max(gaps(taken(block_attention.attend_joined, dtype), exact)) <= near


def routed(given: Tensors, **options: Any) -> tuple[torch.Tensor, list[str]]:
    """What the router gives for a layer, and `default` where the default attended."""
    calls: list[str] = []

    def default(module: torch.nn.Module, query: torch.Tensor, *rest: object, **options: object) -> Any:
        calls.append("default")
        return query.transpose(1, 2), None

    router = attention.AttentionRouter(default, lambda: None)
    mask = options.pop("mask", None)
    query, key, value = given[:3]
    out = router(CausalAttention(query.shape[1] // key.shape[1]), query, key, value, mask, **options)[0]
    return out, calls


def test_takes_long_rows_without_padding_and_no_others() -> None:
    given = tensors(LONG, 4, 2, torch.float32)
    out, calls = routed(given, scaling=0.25)
    assert not calls
    assert torch.allclose(out, plain(given, None, torch.float32)[0], atol=1e-5)
    tril = torch.ones(1, 1, 300, 300, dtype=torch.bool).tril()
    for others, options in (
        (given, {"is_causal": False}),
        (given, {"dropout": 0.1}),
        (given, {"softcap": 30.0}),
        (tensors(LONG - 1, 4, 2, torch.float32), {}),
        (tensors(300, 4, 2, torch.float32), {"mask": tril}),
        ([given[0][:, :, -1:], *given[1:]], {}),
        (tensors(LONG, 4, 2, torch.float64), {}),
    ):
        assert routed(others, **options)[1] == ["default"]


def test_computes_in_bf16_under_autocast_with_exact_scores() -> None:
    given = tensors(300, 4, 2, torch.float32)
    low = [tensor.bfloat16() for tensor in given]
    matmul: Any = import_module("torch.backends").mkldnn.matmul
    before = matmul.fp32_precision
    with torch.autocast("cpu", torch.bfloat16):
        out, calls = routed(given)
    assert (out.dtype, calls) == (torch.bfloat16, [])
    assert torch.equal(out, blockwise(low, None)[0])
    assert matmul.fp32_precision == before


def test_keeps_weights_of_rows_that_are_not_too_long() -> None:
    kept = []
    for tokens in (block_attention.KEPT, block_attention.KEPT + 1):
        query, key, value = (tensor.requires_grad_() for tensor in tensors(tokens, 2, 1, torch.bfloat16)[:3])
        node: Any = block_attention.attend(query, key, value, 0.25).grad_fn
        kept.append(sum(tensor.numel() for tensor in node.saved_tensors[3:]))
    assert kept[0] >= 2 * 2 * block_attention.KEPT**2 / 2
    assert kept[1] == 0
