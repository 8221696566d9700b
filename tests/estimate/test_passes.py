"""The size of a pass and checkpointing: from what is free, with settings of the recipe kept, else one line."""

from typing import Any, Literal

import pytest
import torch

from llmtune.errors import FieldError
from llmtune.estimate.memory import COPIES, Forecast, Setting, StageMemory
from llmtune.estimate.passes import PassSize, fit_pass, setting_of
from llmtune.estimate.products import Products
from llmtune.estimate.trace import Trace
from llmtune.recipe.sections import Recipe, Train

GB = 10**9
LONGEST = 1000
FIXED, PLAIN, CHECKPOINTED = 10 * GB, 5 * 10**6, 10**6


def choose(
    free: float, kind: Literal["cuda", "cpu"] = "cuda", world: int = 1, copies: int = 0, **train: Any
) -> PassSize:
    """The choice for rows of up to 1,000 tokens of 5 MB, 1 MB with checkpointing, beside 10 GB and optional copies."""
    parts, trace = {"weights": FIXED, COPIES: copies}, Trace(1, [], 0, 0, 0, Products())
    stage = StageMemory(parts, PLAIN, CHECKPOINTED, 0, 0.0, trace, optional=copies)
    setting = Setting(kind, torch.bfloat16, world)
    return fit_pass(Train(**{"batch_size": 64, **train}), Forecast([stage]), setting, LONGEST, round(free * GB))


@pytest.mark.parametrize(
    ("free", "tokens", "checkpointing"),
    [
        (200, 16_384, False),  # all that is worth it
        (50, 7_200, False),  # as much as fits
        (34, 4_256, False),  # at least 4,096 tokens fit
        (32, 16_384, True),
        (20, 8_400, True),
        (13, 1_960, True),
    ],
)
def test_gpu_takes_large_passes_and_checkpoints_only_where_few_tokens_fit(
    free: float, tokens: int, checkpointing: bool
) -> None:
    size = choose(free)
    assert (size.tokens, size.checkpointing) == (tokens, checkpointing)


def test_whole_step_that_fits_needs_no_checkpointing() -> None:
    assert choose(26, batch_size=2).checkpointing is False
    assert choose(26, batch_size=2).tokens == 2 * LONGEST
    assert choose(26, batch_size=16, world=8).tokens == 2 * LONGEST


@pytest.mark.parametrize(
    ("free", "tokens", "checkpointing"), [(100, 8_000, False), (20, 2_000, False), (14, 4_000, True)]
)
def test_cpu_takes_8_rows_or_what_fits(free: float, tokens: int, checkpointing: bool) -> None:
    size = choose(free, "cpu")
    assert (size.tokens, size.checkpointing) == (tokens, checkpointing)


@pytest.mark.parametrize(("free", "kept"), [(53, True), (51, False), (20, False), (11.5, False)])
def test_cpu_keeps_copies_of_weights_where_they_take_nothing_from_a_pass(free: float, kept: bool) -> None:
    size, plain = choose(free, "cpu", copies=2 * GB), choose(free, "cpu")
    assert (size.tokens, size.checkpointing, size.copies) == (plain.tokens, plain.checkpointing, kept)
    assert ("without 16-bit copies of weights" in size.reason) == (not kept)


def test_processes_on_cpus_share_what_is_free() -> None:
    assert choose(40, "cpu", world=2) == choose(20, "cpu")


@pytest.mark.parametrize("sharded", ["true", "false"])
def test_processes_that_auto_shards_count_shards(monkeypatch: pytest.MonkeyPatch, sharded: str) -> None:
    sections = {"model": {"base": "x"}, "data": {"train": "y"}, "method": {"kind": "full", "lr": 1e-3}}
    monkeypatch.setenv("ACCELERATE_USE_FSDP", sharded)
    assert setting_of(Recipe.model_validate(sections), 2, "cuda").sharded == (sharded == "true")


def test_settings_of_the_recipe_stand() -> None:
    assert choose(200, micro_batch_size=2).tokens == 2 * LONGEST
    assert choose(200, micro_batch_tokens=3_500).tokens == 3_500
    assert choose(200, micro_batch_tokens=500).tokens == LONGEST
    assert choose(200, activation_checkpointing=True).checkpointing is True
    assert choose(16, activation_checkpointing=False).checkpointing is False
    assert choose(16, activation_checkpointing=False).tokens == LONGEST
    assert choose(16, micro_batch_size=3).checkpointing is True  # left to what is free


def test_named_size_that_may_not_fit_is_told() -> None:
    size = choose(16, micro_batch_size=32)
    assert size.tokens == 32 * LONGEST
    assert size.reason == (
        "passes of up to 32,000 tokens with activation checkpointing (42.0 GB of 16.0 GB free; it may not fit)"
    )


def test_last_row_may_take_all_that_is_free() -> None:
    assert (choose(11).tokens, choose(11).checkpointing) == (LONGEST, True)


def test_reason_is_one_line() -> None:
    reason = choose(50).reason
    assert reason == "passes of up to 7,200 tokens without activation checkpointing (46.0 GB of 50.0 GB free)"


def test_row_that_does_not_fit_is_one_line_with_what_lowers_it() -> None:
    with pytest.raises(FieldError) as raised:
        choose(10.5)
    assert raised.value.exit_code == 3
    assert str(raised.value) == (
        "model.base: one row of 1,000 tokens needs 11.0 GB and 10.5 GB are free; what lowers it: "
        "data.max_length, then model.quantize: 4bit with an adapter, then method.adapter, "
        "then launch.accelerate: fsdp2 over several GPUs"
    )
    with pytest.raises(FieldError, match=r"what lowers it: train.activation_checkpointing: auto, then data.max_length"):
        choose(12, activation_checkpointing=False)
    with pytest.raises(FieldError, match=r"needs 11.0 GB and 5.0 GB are free"):
        choose(10, "cpu", world=2)
