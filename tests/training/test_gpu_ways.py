"""What a GPU computes, tried on CPU tensors: the plain path's losses and gradients, without waiting on the host."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmtune.kernels import device, varlen
from llmtune.kernels.rows import JoinedRows
from tests.support import architectures, tiny
from tests.support.cached import GRADUAL, LORA, assert_equal, fit
from tests.support.gpu_ways import IDS, LENGTHS, adapted, answer_for_gpu, gaps, joiner_of, step
from tests.training.test_joined import padding, plainly

JOINED = {"llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3_text", "gemma4_text", "gpt2", "gpt_neox", "opt"}
JOINED |= {"starcoder2", "olmo2", "granite", "cohere2", "mixtral", "qwen3_moe", "llama4_text", "phimoe", "deepseek_v3"}
MASKED = {"gemma2", "gptj", "bloom", "mpt", "gpt_oss", "mamba", "mamba2", "rwkv", "xlstm"}
"""Architectures that attend in a way of their own, or not at all."""
QUICK = ("llama", "gemma3_text", "falcon", "qwen3_5_text", "opt")
KINDS = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in architectures.KINDS]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_for_gpu(monkeypatch)


def compared(kind: str, adapter: str = "none", mixed: bool = False, **more: Any) -> tuple[float, float, list[str]]:
    """How far loss and gradients are from the plain ones, and the ways that were proved."""
    ours, joiner = step(adapted(kind, adapter, **more), ours=True, mixed=mixed)
    plain, _ = step(adapted(kind, adapter, **more), ours=False, mixed=mixed)
    assert joiner is not None
    return *gaps(ours, plain), joiner.ways


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("gpu")
def test_losses_and_gradients_equal_the_plain_ones_on_every_architecture(kind: str) -> None:
    of_loss, of_gradients, ways = compared(kind)
    assert max(of_loss, of_gradients) <= 1e-5
    assert ways == ([] if kind in MASKED else ["joined"] if kind in JOINED else ["unmasked"])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("adapter", ["lora", "dora", "bottleneck", "none"])
@pytest.mark.usefixtures("gpu")
def test_losses_and_gradients_equal_the_plain_ones_with_every_adapter(adapter: str, checkpointing: bool) -> None:
    of_loss, of_gradients, ways = compared("llama", adapter, checkpointing=checkpointing)
    assert max(of_loss, of_gradients) <= 1e-5
    assert ways == ["joined"]


@pytest.mark.parametrize("adapter", ["lora", "dora", "bottleneck", "none"])
@pytest.mark.usefixtures("gpu")
def test_bf16_is_as_near_as_batching(adapter: str) -> None:
    of_loss, of_gradients, ways = compared("qwen3", adapter, mixed=True)
    assert of_loss <= 1e-4
    assert of_gradients <= 2e-2
    assert ways == ["joined"]
