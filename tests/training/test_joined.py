"""Rows joined without padding: the plain path's losses and gradients, and padding where joining is not equal."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from llmtune.kernels.cpu.attention import ShortAttention
from llmtune.kernels.cpu.cross_entropy import cross_entropy
from llmtune.kernels.rows import JoinedRows
from llmtune.training import objective
from llmtune.training.joining.batch import model_inputs
from tests.support import architectures, tiny, training
from tests.support.cached import CALM, GRADUAL, KINDS, LORA, Fit, assert_equal, fit

FULL = {"kind": "full", "lr": 0.01}


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train as TRL, PEFT and torch do: padded rows, their attention, their layers, their cross-entropy."""
    monkeypatch.setattr(objective, "row_attention", lambda: nullcontext(None))
    monkeypatch.setattr(objective, "install", lambda *arguments: None)

    def plain(logits: torch.Tensor, targets: torch.Tensor, scale: float) -> torch.Tensor:
        return functional.cross_entropy(logits.float(), targets, reduction="sum") * scale

    monkeypatch.setattr(objective, "cross_entropy", plain)


def padding(result: Fit) -> float:
    """The largest share of padding in a step."""
    return max(entry.get("padding", 0) for entry in result[1])


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", LORA], ids=["none", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_joined_rows_match_padded_losses_and_gradients_on_every_architecture(
    tmp_path: Path, kind: str, adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, more = {**FULL, "adapter": adapter}, CALM.get(kind, {})
    ours = fit(tmp_path, method, model=tiny.model(kind, blocks=4, **more), keep=False, steps=4, eval_steps=2)
    plainly(monkeypatch)
    plain = fit(tmp_path, method, model=tiny.model(kind, blocks=4, **more), keep=False, steps=4, eval_steps=2)
    assert padding(plain) > 0
    assert_equal(ours, plain)
    if kind in ("llama", "qwen3", "gemma3_text", "mixtral", "gpt_neox"):
        assert padding(ours) == 0


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("adapter", ["none", LORA], ids=["none", "lora"])
def test_joined_rows_match_padded_with_cached_blocks_stages_and_accumulation(
    tmp_path: Path, checkpointing: bool, adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {"gradient_accumulation_steps": 2, "gradient_checkpointing": checkpointing}
    method = {**GRADUAL, "adapter": adapter}
    ours = fit(tmp_path, method, always=True, **more)
    assert "cached below block 2, 3" in ours[0]
    assert padding(ours) == 0
    plainly(monkeypatch)
    assert_equal(ours, fit(tmp_path, method, keep=False, **more))


@pytest.mark.parametrize("kind", ["lfm2", "qwen3_5_text"])
def test_rows_of_models_that_carry_a_state_stay_padded_in_bf16_too(tmp_path: Path, kind: str) -> None:
    model = architectures.model(kind)
    assert padding(fit(tmp_path, FULL, model=model, keep=False, steps=1, bf16=True)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "frozen", "lora"])
def test_bf16_losses_are_as_near_as_batching(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"full": FULL, "frozen": FULL | {"kind": "frozen", "reach": 2}, "lora": FULL | {"adapter": LORA}}[method]
    scored: set[torch.dtype] = set()

    def score(logits: torch.Tensor, targets: torch.Tensor, scale: float) -> torch.Tensor:
        scored.add(logits.dtype)
        return cross_entropy(logits, targets, scale)

    attended: list[torch.dtype] = []
    attend = ShortAttention.forward

    def watched(ctx: Any, query: torch.Tensor, *others: Any) -> torch.Tensor:
        attended.append(query.dtype)
        return attend(ctx, query, *others)

    monkeypatch.setattr(objective, "cross_entropy", score)
    monkeypatch.setattr(ShortAttention, "forward", staticmethod(watched))
    ours = fit(tmp_path, chosen, keep=False, bf16=True, model=tiny.model(blocks=4).bfloat16())
    assert padding(ours) == 0
    assert set(attended) == {torch.bfloat16}
    plainly(monkeypatch)
    plain = fit(tmp_path, chosen, keep=False, bf16=True, model=tiny.model(blocks=4).bfloat16())
    assert scored == {torch.bfloat16}
    losses = [[entry["loss"] for entry in run[1] if "loss" in entry] for run in (ours, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0] != losses[1], "the plain path ran"


def test_keeps_padding_for_a_model_that_mixes_neighbors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> PreTrainedModel:
        mixing = tiny.model(blocks=4)
        mlp = mixing.model.layers[0].mlp
        plain = mlp.forward
        mlp.forward = lambda x: plain(x + functional.pad(x, (0, 0, 1, 0))[:, :-1])
        return mixing

    ours = fit(tmp_path, FULL, keep=False, model=model())
    assert padding(ours) > 0
    plainly(monkeypatch)
    assert_equal(ours, fit(tmp_path, FULL, keep=False, model=model()))


@pytest.mark.slow
def test_losses_are_equal_however_often_validation_runs(tmp_path: Path) -> None:
    once = fit(tmp_path, FULL, keep=False, eval_steps=7)
    often = fit(tmp_path, FULL, keep=False, eval_steps=1)
    losses = [[entry["loss"] for entry in run[1] if "loss" in entry] for run in (once, often)]
    assert losses[0] == losses[1]


def test_shared_rows_need_padding() -> None:
    assert len({len(row["input_ids"]) for row in training.rows(4)}) > 1


def test_positions_start_anew_at_every_joined_row_and_at_the_filler() -> None:
    ids = torch.tensor([[7, 8, 0, 0], [1, 2, 3, 4]])
    inputs = model_inputs(ids, JoinedRows([2, 4], 4))
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3, 0]]
    assert inputs["input_ids"].tolist() == [[7, 8, 1, 2, 3, 4, 7]]
