"""Kernels for rows of various lengths: called as their libraries say, equal to one row after another."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen as torchs

from llmtune.kernels import varlen
from llmtune.kernels.rows import JoinedRows
from tests.support.layers import relative_error

ROWS = JoinedRows([9, 4, 6], 9)
FLASH_ATTN = """
def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1)):
    assert causal and not dropout_p
    from tests.kernels.test_varlen import attend
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window_size)
"""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    key_starts: torch.Tensor | None,
    longest: int,
    longest_key: int,
    scale: float | None,
    window: Any,
) -> torch.Tensor:
    """Attention as FlashAttention defines it, row by row: a window (left, 0) shows `left` tokens before each."""
    lengths = starts.diff().tolist()
    assert starts.dtype == torch.int32
    assert key_starts is not None
    assert torch.equal(starts, key_starts)
    assert longest == longest_key == max(lengths)
    assert window[1] == 0
    rows = JoinedRows(lengths[:-1], longest)
    assert scale is not None
    return varlen.row_by_row((query, key, value), rows, scale, None if window[0] < 0 else window[0] + 1)


def _forward(query: Any, key: Any, value: Any, starts: Any, key_starts: Any, *others: Any) -> Any:
    longest, longest_key, is_causal, scale, window, *_ = others
    assert is_causal == (list(window) == [-1, 0])
    out = attend(query, key, value, starts, key_starts, longest, longest_key, scale, window)
    return out, out.new_empty(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


def _backward(of_out: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, starts: Any, *others: Any) -> Any:
    key_starts, longest, longest_key, _, _, scale, window = others

    def differentiate() -> Any:
        query_, key_, value_ = (tensor.detach().requires_grad_() for tensor in (query, key, value))
        again = attend(query_, key_, value_, starts, key_starts, longest, longest_key, scale, window)
        return torch.autograd.grad(again, (query_, key_, value_), of_out)

    # Inside an operator, its own thread records no gradients.
    with ThreadPoolExecutor(1) as other:
        return other.submit(differentiate).result()


@pytest.fixture(scope="module", autouse=True)
def torchs_kernel_on_cpus() -> None:
    """Give torch's operator, which has kernels for GPUs alone, one for CPUs."""
    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", _forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", _backward)


def tensors(shared: int = 2) -> varlen.Heads:
    """Queries with 4 heads, keys and values, as a model gives them: heads before tokens in memory."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(heads, ROWS.length, 8).transpose(0, 1) for heads in (4, shared, shared))
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def assert_right(kernel: varlen.Kernel, window: int | None, shared: int = 2) -> None:
    """The kernel gives the outputs and gradients of one row after another."""
    heads = tensors(shared)
    results = []
    for attention in (kernel, varlen.row_by_row):
        out = attention(heads, ROWS, 0.3, window)
        of_out = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append([out.detach(), *torch.autograd.grad(out, heads, of_out)])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_calls_torchs_kernel_as_torch_says(window: int | None, shared: int) -> None:
    kernel = varlen._torch_kernel()
    assert kernel is not None
    assert_right(kernel, window, shared)


def test_calls_the_kernels_of_earlier_torch_versions_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_2_11(
        query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int,
        *, return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:  # fmt: skip
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)

    def of_2_10(
        query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int,
        is_causal: bool = False, return_aux: Any = None, scale: float | None = None,
    ) -> torch.Tensor:  # fmt: skip
        assert is_causal
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, (-1, 0))

    monkeypatch.setattr(torchs, "varlen_attn", of_2_11)
    newer = varlen._torch_kernel()
    assert newer is not None
    assert_right(newer, 3)
    monkeypatch.setattr(torchs, "varlen_attn", of_2_10)
    older = varlen._torch_kernel()
    assert older is not None
    assert_right(older, None)
    with pytest.raises(NotImplementedError, match="no window"):
        older(tensors(), ROWS, 0.3, 3)


def test_calls_flash_attn_where_torch_has_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text(FLASH_ATTN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr(varlen, "_torch_kernel", lambda: None)
    varlen.kernel.cache_clear()
    chosen = varlen.kernel()
    varlen.kernel.cache_clear()
    monkeypatch.delitem(sys.modules, "flash_attn")
    assert chosen is not None
    assert chosen.__name__ == "flash_attn"
    for window in (None, 3):
        assert_right(chosen, window)


@pytest.mark.parametrize("length", [3, varlen.LONGEST + 40])
def test_tells_a_right_kernel_from_a_wrong_one_on_rows_of_any_length(length: int) -> None:
    rows = JoinedRows([length, 5], max(length, 5))
    query, key, value = (torch.randn(rows.length, heads, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    heads = query, key, value
    assert varlen.is_right(varlen.row_by_row, heads, rows, 0.3, None)

    def one_row(heads: varlen.Heads, rows: JoinedRows, scale: float, window: int | None) -> torch.Tensor:
        return varlen.row_by_row(heads, JoinedRows([rows.tokens], rows.tokens), scale, window)

    assert not varlen.is_right(one_row, heads, rows, 0.3, None)


def test_row_by_row_is_attention_within_each_row() -> None:
    query, key, value = (tensor.detach() for tensor in tensors(4))
    out = varlen.row_by_row((query, key, value), ROWS, 0.3, 2)
    start, place = ROWS.starts[1], ROWS.starts[1] + 3
    for token, seen in ((start, slice(start, start + 1)), (place, slice(place - 1, place + 1))):
        weights = torch.softmax(torch.einsum("hd,shd->hs", query[token], key[seen]) * 0.3, -1)
        assert relative_error(out[token], torch.einsum("hs,shd->hd", weights, value[seen])) <= 1e-6
