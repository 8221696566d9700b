"""What a GPU computes, tried on CPU tensors: the plain path's losses and gradients, without waiting on the host."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.kernels import varlen
from llmtune.kernels.rows import Inputs, JoinedRows
from llmtune.training.joining import joiner as joiner_module
from llmtune.training.joining.joiner import RowJoiner, Way
from tests.support import ROOT, architectures
from tests.support.cached import GRADUAL, LORA, assert_equal, fit
from tests.support.gpu_ways import (
    IDS,
    LENGTHS,
    Calls,
    adapted,
    answer_for_gpu,
    gaps,
    joiner_of,
    padded,
    share_weights,
    step,
)
from tests.training.test_joined import padding, plainly

JOINED = {"llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3_text", "gemma4_text", "gpt2", "gpt_neox", "opt"}
JOINED |= {"starcoder2", "olmo2", "granite", "cohere2", "mixtral", "qwen3_moe", "llama4_text", "phimoe", "deepseek_v3"}
MASKED = {"gemma2", "gptj", "bloom", "mpt", "gpt_oss", "mamba", "mamba2", "rwkv", "xlstm"}
"""Architectures that attend in a way of their own, or not at all."""
QUICK = ("llama", "gemma3_text", "falcon", "qwen3_5_text", "opt")
KINDS = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in architectures.KINDS]

SLOW = [pytest.param(adapter, marks=pytest.mark.slow) for adapter in ("dora", "bottleneck")]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_for_gpu(monkeypatch)


def compared(kind: str, adapter: str = "none", mixed: bool = False, **more: Any) -> tuple[float, float, list[Way]]:
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
@pytest.mark.parametrize("adapter", ["lora", "none", *SLOW])
@pytest.mark.usefixtures("gpu")
def test_losses_and_gradients_equal_the_plain_ones_with_every_adapter(adapter: str, checkpointing: bool) -> None:
    of_loss, of_gradients, ways = compared("llama", adapter, checkpointing=checkpointing)
    assert max(of_loss, of_gradients) <= 1e-5
    assert ways == ["joined"]


@pytest.mark.parametrize("adapter", ["lora", *SLOW, pytest.param("none", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("gpu")
def test_bf16_is_as_near_as_batching(adapter: str) -> None:
    of_loss, of_gradients, ways = compared("qwen3", adapter, mixed=True)
    assert of_loss <= 1e-4
    assert of_gradients <= 2e-2
    assert ways == ["joined"]


@pytest.mark.parametrize("adapter", ["none", pytest.param(LORA, marks=pytest.mark.slow)], ids=["none", "lora"])
@pytest.mark.usefixtures("gpu")
def test_training_with_cached_blocks_and_stages_equals_the_plain_one(
    tmp_path: Path, adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = GRADUAL | {"adapter": adapter}
    ours = fit(tmp_path, method, always=True, steps=6, eval_steps=3)
    assert "cached below block 2, 3" in ours[0]
    assert padding(ours) == 0
    monkeypatch.undo()
    plainly(monkeypatch)
    assert_equal(ours, fit(tmp_path, method, keep=False, steps=6, eval_steps=3))


def refused(kind: str = "llama", lengths: tuple[int, ...] = LENGTHS, **more: Any) -> tuple[list[Way], dict[Way, str]]:
    """The ways that were proved for a model and why others were not taken."""
    model = adapted(kind, **more)
    with joiner_of(model) as joiner:
        joiner.prepare(padded(lengths), None, lengths)
        return [*joiner.ways], {**joiner.refusals}


def test_keeps_padding_where_no_kernel_is_installed_or_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> torch.Tensor:
        raise RuntimeError("no kernel image is available\nfor this device")

    def silent(*arguments: object) -> torch.Tensor:
        raise NotImplementedError

    answer_for_gpu(monkeypatch, None)
    assert refused() == (["unmasked"], {"joined": "no kernel for rows of various lengths is installed"})
    answer_for_gpu(monkeypatch, failing)
    assert refused() == (["unmasked"], {"joined": "RuntimeError: no kernel image is available"})
    answer_for_gpu(monkeypatch, silent)
    assert refused() == (["unmasked"], {"joined": "NotImplementedError:"})


@pytest.mark.parametrize("fault", ["gradient", "window"])
def test_keeps_padding_where_a_kernel_is_wrong(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(heads: varlen.Heads, rows: JoinedRows, scale: float, window: int | None) -> torch.Tensor:
        query, key, value = heads
        if fault == "gradient":
            key = 2 * key - key.detach()
        return varlen.row_by_row((query, key, value), rows, scale, None if fault == "window" else window)

    answer_for_gpu(monkeypatch, wrong)
    ways, reasons = refused("gemma3_text")
    assert ways == ["unmasked"]
    assert "wrong is not exact for" in reasons["joined"]


def test_a_kernel_is_given_heads_of_one_width(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: set[tuple[int, ...]] = set()

    def watched(heads: varlen.Heads, *others: Any) -> torch.Tensor:
        widths.add(tuple(tensor.shape[2] for tensor in heads))
        return varlen.row_by_row(heads, *others)

    answer_for_gpu(monkeypatch, watched)
    of_loss, of_gradients, ways = compared("deepseek_v3")
    assert max(of_loss, of_gradients) <= 1e-5
    assert ways == ["joined"]
    assert widths == {(16, 16, 16)}


def test_keeps_padding_for_attention_that_is_dropped_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_for_gpu(monkeypatch)
    ways, reasons = refused("gpt2", attn_pdrop=0.1)
    assert ways == ["unmasked"]
    assert "GPT2Attention" in reasons["joined"]
    assert refused("gpt2", resid_pdrop=0.1) == (["joined"], {})


def test_running_out_of_memory_is_no_reason_to_pad(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*arguments: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    answer_for_gpu(monkeypatch, exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        refused()


@pytest.mark.usefixtures("gpu")
def test_rows_without_padding_are_joined_and_proved_with_some() -> None:
    assert refused(lengths=(11, 11, 11)) == (["joined"], {})
    ways, reasons = refused("lfm2", lengths=(11, 11, 11))
    assert ways == ["unmasked"]
    assert reasons["joined"].startswith("hidden states of joined rows differ by ")


@pytest.mark.usefixtures("gpu")
def test_tries_no_more_of_long_rows_than_windows_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joiner_module, "PROBED", 5)
    tried: set[int] = set()
    hidden = RowJoiner._hidden

    def watched(joiner: RowJoiner, inputs: Inputs, depth: int) -> torch.Tensor:
        tried.add(inputs["input_ids"].shape[1])
        return hidden(joiner, inputs, depth)

    monkeypatch.setattr(RowJoiner, "_hidden", watched)
    assert refused() == (["joined"], {})
    assert tried == {5, 4 + 5 + 1, 8 * 5 + 1}, "two rows padded, and joined with the filler, and copies of one"
    tried.clear()
    assert refused("mistral", sliding_window=4) == (["joined"], {})
    assert tried == {8, 4 + 8 + 1, 8 * 5 + 1}
    ours = fit(tmp_path, GRADUAL, always=True, steps=6, eval_steps=3)
    assert "cached below block 2, 3" in ours[0]
    assert padding(ours) == 0


@pytest.mark.usefixtures("gpu")
def test_rows_longer_than_a_window_are_proved_anew() -> None:
    model = adapted("mistral", sliding_window=6)
    with joiner_of(model) as joiner:
        for lengths in ((4, 3), (5, 2), (9, 4)):
            joiner.prepare(padded(lengths), None, lengths)
            assert joiner.ways == ["joined"] * (2 if max(lengths) > 6 else 1)


@pytest.mark.usefixtures("gpu")
def test_processes_that_share_weights_prove_in_their_first_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = share_weights(monkeypatch, agree=False)
    with joiner_of(adapted("mistral", sliding_window=6)) as joiner:
        for lengths in ((4, 3), (5, 2), (9, 4)):
            batch = padded(lengths)
            inputs, rows = joiner.prepare(batch, None, lengths)
            assert rows is None
            assert torch.equal(inputs["attention_mask"], batch["attention_mask"]), "another process found it unequal"
    assert verdicts == [True, True], "joined and unmasked, each once"


@pytest.mark.usefixtures("gpu")
def test_no_process_tries_alone_what_others_that_share_weights_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    together = share_weights(monkeypatch, agree=True)
    with joiner_of(adapted("mistral", sliding_window=6)) as joiner:
        for lengths in ((4, 3), (9, 4), (5, 2)):
            _, rows = joiner.prepare(padded(lengths), None, lengths)
            assert (rows is None) is (max(lengths) > 6), "others may have no row beyond the window"
    assert together == [True], "joined, in the first pass"


@pytest.mark.parametrize("kind", ["llama", "falcon"])
@pytest.mark.usefixtures("gpu")
def test_the_host_waits_for_nothing_once_rows_are_proved(kind: str) -> None:
    model = adapted(kind, "lora")
    mask = torch.ones_like(IDS)
    reads = {"_local_scalar_dense", "is_nonzero", "equal"}
    with joiner_of(model) as joiner:
        joiner.prepare({"input_ids": IDS, "attention_mask": mask}, None, LENGTHS)
        with Calls() as calls:
            inputs, _ = joiner.prepare({"input_ids": IDS, "attention_mask": mask}, None, LENGTHS)
            model(**inputs, use_cache=False)
        assert not reads & set(calls.names)
    with Calls() as calls:
        adapted("llama")(input_ids=IDS, attention_mask=mask, use_cache=False)
    assert reads & set(calls.names), "a mask is read where rows are not proved"


@pytest.mark.slow
def test_processes_that_share_weights_prove_together(tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.support.gpu_processes", str(tmp_path / "found.json")]
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    for kind, way in (("llama", "joined"), ("lfm2", "unmasked")):
        of_loss, of_gradients, ways = json.loads((tmp_path / "found.json").read_text())[kind]
        assert max(of_loss, of_gradients) <= 1e-5
        assert ways == [way]
