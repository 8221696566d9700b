"""Rows too long for a mask on CPUs: joined or without one, with the plain path's losses and gradients."""

from typing import Any

import pytest
import torch

from llmtune.kernels.cpu import attention
from llmtune.kernels.rows import JoinedRows
from tests.support import architectures, gpu_ways
from tests.support.gpu_ways import adapted, gaps, joiner_of, padded, step
from tests.training.test_gpu_ways import JOINED, KINDS, MASKED


def compared(kind: str, adapter: str = "none", mixed: bool = False, **more: Any) -> tuple[float, float, list[str]]:
    """How far loss and gradients are from the plain ones, and the ways that were proved."""
    ours, joiner = step(adapted(kind, adapter, **more), ours=True, mixed=mixed)
    plain, _ = step(adapted(kind, adapter, **more), ours=False, mixed=mixed)
    assert joiner is not None
    return *gaps(ours, plain), [*joiner.ways]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_equal_the_plain_ones_on_every_architecture(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SHORT", 0)
    of_loss, of_gradients, ways = compared(kind)
    assert max(of_loss, of_gradients) <= 1e-5
    assert ways == ([] if kind in MASKED else ["joined"] if kind in JOINED else ["unmasked"])


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
def test_long_rows_are_joined_with_equal_losses_and_gradients(mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (300, 70, 193)
    monkeypatch.setattr(gpu_ways, "LENGTHS", lengths)
    monkeypatch.setattr(gpu_ways, "IDS", torch.randint(3, 200, (3, 300), generator=torch.Generator().manual_seed(1)))
    of_loss, of_gradients, ways = compared("mistral", "lora", mixed, sliding_window=150, max_position_embeddings=512)
    assert ways == ["joined"]
    assert of_loss <= (2e-3 if mixed else 1e-5)
    assert of_gradients <= (3e-2 if mixed else 1e-5)


def test_many_short_rows_are_joined_without_a_mask_over_all_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[torch.Tensor] = []
    split = JoinedRows.split_mask

    def watched(rows: JoinedRows, mask: torch.Tensor) -> torch.Tensor:
        masks.append(mask)
        return split(rows, mask)

    monkeypatch.setattr(JoinedRows, "split_mask", watched)
    for most in (22, 21):
        monkeypatch.setattr(attention, "MASKED", most)
        masks.clear()
        ours, joiner = step(adapted("llama"), ours=True)
        plain, _ = step(adapted("llama"), ours=False)
        assert max(gaps(ours, plain)) <= 1e-5
        assert joiner is not None
        assert joiner.ways == ["joined"]
        assert bool(masks) == (most == 22), "the rows have 22 tokens"


def test_rows_without_padding_stay_as_they_are_unless_a_window_needs_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SHORT", 0)
    for model, expected in ((adapted("llama"), []), (adapted("mistral", sliding_window=4), ["joined"])):
        with joiner_of(model) as joiner:
            joiner.prepare(padded((11, 11)), None, (11, 11))
        assert joiner.ways == expected


def test_rows_stay_padded_where_attention_has_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SHORT", 0)
    with joiner_of(architectures.model("gpt2", attn_pdrop=0.1).train()) as joiner:
        joiner.prepare(padded((11, 4)), None, (11, 4))
    assert "GPT2Attention attends with an extra" in joiner.refusals["joined"]
