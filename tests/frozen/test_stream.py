"""Streamed blocks: the same result as with all blocks in memory, from one at a time."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmtune.adapters.delta import load_delta
from llmtune.files import read_json
from llmtune.frozen import build
from llmtune.frozen.build import BuildProgress, run_rows
from llmtune.frozen.stand_in import StubbedDecoder
from llmtune.frozen.store import DATA, OutputWriter
from llmtune.frozen.stream import OffloadedBlocks
from llmtune.model.base import Base, load_model
from llmtune.model.files.locate import locate_base
from llmtune.run import open_run
from llmtune.training.checkpoint import complete_checkpoints
from llmtune.training.loop import train
from tests.support import tiny
from tests.support.streams import (
    FROZEN,
    KINDS,
    LORA,
    NARROWING,
    STAGED,
    assert_same,
    delta,
    frozen_blocks_line,
    losses,
    prepared,
    read,
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_run_equals_a_cached_one(tmp_path: Path, cache: Path, kind: str) -> None:
    cached = prepared(tmp_path, "cache", kind=kind)
    train(cached)
    (entry,) = cache.iterdir()
    outputs = read(entry)
    shutil.rmtree(cache)
    ours = prepared(tmp_path, "stream", kind=kind)
    train(ours)
    assert [folder.name for folder in cache.iterdir()] == [entry.name], "one boundary, under the same name"
    assert "cached below block 3" in frozen_blocks_line(ours)
    if kind == "mixtral":  # padding takes part in how tokens are shared out to experts
        one, other = (torch.frombuffer(bytearray(data), dtype=torch.float32) for data in (outputs, read(entry)))
        assert (one - other).norm() <= 1e-6 * other.norm()
        assert losses(ours) == pytest.approx(losses(cached), rel=1e-5)
        return
    assert read(entry) == outputs
    assert_same(ours, cached)
    load_delta(load_model(locate_base(ours.recipe().model)), ours.delta)


@pytest.mark.slow
@pytest.mark.parametrize("method", [FROZEN, {**FROZEN, "adapter": LORA}], ids=["frozen", "lora"])
def test_streamed_run_equals_a_cached_one_in_bf16(tmp_path: Path, cache: Path, method: dict[str, Any]) -> None:
    both = []
    for how in ("cache", "stream"):
        both.append(prepared(tmp_path, how, method, model={"base": str(tmp_path / "base"), "precision": "bf16"}))
        train(both[-1])
        shutil.rmtree(cache)
    assert_same(*both)


@pytest.mark.slow
@pytest.mark.parametrize("method", [{**FROZEN, "adapter": LORA}, STAGED, {**STAGED, "adapter": LORA}, NARROWING])
def test_streamed_run_has_the_losses_of_a_recomputed_one(tmp_path: Path, method: dict[str, Any]) -> None:
    recomputed = prepared(tmp_path, "recompute", method)
    train(recomputed)
    ours = prepared(tmp_path, "stream", method)
    train(ours)
    assert losses(ours) == pytest.approx(losses(recomputed), rel=1e-5)


def test_reads_shards_like_one_file(tmp_path: Path) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    tiny.save_base(one, blocks=4)
    tiny.save_base(several, blocks=4)
    stored = load_file(several / "model.safetensors")
    (several / "model.safetensors").unlink()
    names = sorted(stored)
    where = {name: f"model-{at % 3}.safetensors" for at, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: stored[name] for name in names if where[name] == file}, several / file, {"format": "pt"})
    (several / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    full = load_model(Base(one, "one", None, None))
    for folder in (one, several):
        offloaded = OffloadedBlocks(Base(folder, "tiny", None, None), 3, torch.float32)
        loaded = offloaded.load()
        listed = list(loaded.model.layers)
        assert all(not p.numel() for block in listed[:3] for p in block.parameters())
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        for at, block in enumerate(listed[:3]):
            with offloaded.loaded(at, block):
                theirs = dict(full.model.layers[at].named_parameters())
                assert all(torch.equal(p, theirs[name]) for name, p in block.named_parameters())
            assert all(not p.numel() for p in block.parameters())
        outside = {name: p for name, p in loaded.named_parameters() if p.numel()}
        theirs = dict(full.named_parameters())
        assert all(torch.equal(p, theirs[name]) for name, p in outside.items())
        buffers = dict(full.named_buffers())
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in loaded.named_buffers())
        (folder / "model-0.safetensors").unlink(missing_ok=True)


@pytest.mark.slow
def test_reuses_a_cached_boundary_without_building(tmp_path: Path, cache: Path) -> None:
    train(prepared(tmp_path, "cache"))
    (entry,) = cache.iterdir()
    written = (entry / DATA).stat()
    ours = prepared(tmp_path, "stream")
    train(ours)
    assert [folder.name for folder in cache.iterdir()] == [entry.name]
    assert ((entry / DATA).stat().st_ino, (entry / DATA).stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    assert "reused below block 3" in frozen_blocks_line(ours)


def test_holds_one_block_in_memory_and_two_boundaries_on_disk(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory: list[int] = []

    def watched(decoder: StubbedDecoder, *arguments: Any) -> None:
        run_rows(decoder, *arguments)
        in_memory.append(sum(1 for block in decoder.blocks[:3] if any(p.numel() for p in block.parameters())))
        assert len(list(cache.iterdir())) <= 2

    monkeypatch.setattr(build, "run_rows", watched)
    train(prepared(tmp_path, "stream"))
    assert in_memory == [1, 1, 1]


@pytest.mark.slow
def test_killed_build_resumes_at_its_last_block(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def interrupted(decoder: StubbedDecoder, writers: dict[int, OutputWriter], start: int, *arguments: Any) -> None:
        ran.append(start)
        if ran == [0, 1, 2]:
            raise KeyboardInterrupt
        run_rows(decoder, writers, start, *arguments)

    monkeypatch.setattr(build, "run_rows", interrupted)
    ours = prepared(tmp_path, "stream")
    with pytest.raises(KeyboardInterrupt):
        train(ours)
    train(open_run(ours.path))
    assert ran == [0, 1, 2, 2]
    cached = prepared(tmp_path, "cache")
    train(cached)
    assert_same(ours, cached)


@pytest.mark.slow
@pytest.mark.parametrize("method", [FROZEN, {**STAGED, "adapter": LORA}], ids=["frozen", "staged lora"])
@pytest.mark.parametrize("fresh", [False, True], ids=["cached", "cache gone"])
def test_resume_ends_bit_equal(tmp_path: Path, cache: Path, method: dict[str, Any], fresh: bool) -> None:
    uninterrupted = prepared(tmp_path, "stream", method, "llama", "uninterrupted", memory={"frozen_blocks": "stream"})
    train(uninterrupted)
    ours = prepared(tmp_path, "stream", method)
    train(ours)
    for checkpoint in complete_checkpoints(ours.checkpoints)[1:]:
        shutil.rmtree(checkpoint)
    shutil.rmtree(ours.delta)
    if fresh:
        shutil.rmtree(cache)
    train(open_run(ours.path))
    assert_same(ours, uninterrupted)


def test_plan_predicts_less_memory(tmp_path: Path) -> None:
    cached, streamed = (read_json(prepared(tmp_path, how).plan_file) for how in ("cache", "stream"))
    block = sum(p.numel() for p in tiny.model(blocks=1).model.layers[0].parameters())
    assert cached["states_bytes"] - streamed["states_bytes"] == 4 * 3 * block  # in fp32


def test_prints_progress_every_10_seconds() -> None:
    now = [0.0]
    lines: list[str] = []
    progress = BuildProgress(1000, lines.append, lambda: now[0])
    for second in range(1, 101):
        now[0] = float(second)
        progress.add(10, "block 3 of 24, ")
    assert lines[0] == "frozen blocks: filling the cache, block 3 of 24, 10%, 10 tokens/s, 1:30 left"
    assert len(lines) == 10
    assert lines[-1].endswith("100%, 10 tokens/s, 0:00 left")
    short: list[str] = []
    BuildProgress(10, short.append, lambda: 0.0).add(10, "")
    assert not short


def large_base(folder: Path) -> Path:
    """A base of 16 blocks, 0.5 GB in bf16 and 1.1 GB in fp32, in four files."""
    config = tiny.config(blocks=16, hidden=1024, intermediate_size=4096, num_key_value_heads=4, head_dim=256)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    where = {name: f"model-{at * 4 // len(shapes)}.safetensors" for at, name in enumerate(shapes)}
    folder.mkdir()
    drawn = {shape: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) for shape in set(shapes.values())}
    for file in sorted(set(where.values())):
        part = {name: drawn[shape].clone() for name, shape in shapes.items() if where[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


LIMITED = """
import re, resource, sys
from pathlib import Path
from llmtune import run
from llmtune.training.loop import train
data = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
most = (data + 600 * 1024) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
try:
    train(run.open_run(Path(sys.argv[1])))
except (MemoryError, RuntimeError) as error:
    sys.exit(f"no memory: {error}")
print("peak", int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by RLIMIT_DATA as Linux counts it")
def test_trains_a_model_larger_than_memory(tmp_path: Path) -> None:
    large_base(tmp_path / "base")
    results = {}
    for how in ("recompute", "stream"):
        run = prepared(tmp_path, how, train={"epochs": 1, "batch_size": 4, "max_steps": 2, "optimizer": "sgd"})
        command = [sys.executable, "-c", LIMITED, str(run.path)]
        # Freed memory that the allocator keeps would count as used.
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
        results[how] = (
            subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False),
            run,
        )
    plain, ours = results["recompute"], results["stream"]
    assert plain[0].returncode == 1
    assert "no memory" in plain[0].stderr
    assert not plain[1].delta.exists()
    assert ours[0].returncode == 0, ours[0].stderr
    assert "cached below block 15" in frozen_blocks_line(ours[1])
    assert sum(tensor.numel() for tensor in delta(ours[1]).values()) == read_json(ours[1].plan_file)["trained"]
