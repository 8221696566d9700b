"""Refuses what cannot be streamed by its key, and ends in one line where something goes wrong on the way."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtune.errors import MachineError, RecipeError, TrainingError
from llmtune.frozen.store import DATA, OutputWriter, StoredOutputs
from llmtune.frozen.stream import OffloadedBlocks
from llmtune.model.base import Base
from llmtune.training.loop import train
from tests.support import tiny
from tests.support.streams import FROZEN, LORA, frozen_blocks_line, prepared, read

Usage = namedtuple("Usage", "total used free")


def test_refuses_a_base_that_lacks_a_tensor_of_a_low_block(tmp_path: Path) -> None:
    file = tiny.save_base(tmp_path / "base", blocks=4) / "model.safetensors"
    stored = load_file(file)
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(RecipeError, match=r"tiny: its files lack model\.layers\.1\.mlp\.up_proj\.weight, which"):
        OffloadedBlocks(Base(tmp_path / "base", "tiny", None, None), 3, torch.float32).load()


def test_ends_a_run_whose_outputs_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = StoredOutputs.read
    monkeypatch.setattr(StoredOutputs, "read", lambda self, rows, tokens: original(self, rows, tokens).mul_(1.001))
    with pytest.raises(TrainingError, match="outputs of block 3 differ from the full model's"):
        train(prepared(tmp_path, "stream"))


@pytest.mark.slow
def test_refuses_outputs_of_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(prepared(tmp_path, "cache"))
    shutil.rmtree(tmp_path / "base")
    tiny.save_base(tmp_path / "base", seed=1, blocks=4)
    monkeypatch.setattr("llmtune.training.loop.weights_digest", lambda folder: "the same")
    train(prepared(tmp_path, "cache", name="other"))
    shutil.rmtree(tmp_path / "base")
    tiny.save_base(tmp_path / "base", seed=2, blocks=4)
    with pytest.raises(TrainingError, match="differ"):
        train(prepared(tmp_path, "stream"))


@pytest.mark.slow
def test_rebuilds_a_damaged_entry(tmp_path: Path, cache: Path) -> None:
    train(prepared(tmp_path, "stream"))
    (folder,) = cache.iterdir()
    good = read(folder)
    (folder / DATA).write_bytes(good[:-4] + b"\0\0\0\1")
    ours = prepared(tmp_path, "stream", name="again")
    train(ours)
    assert "1 damaged or foreign cache entry not used" in frozen_blocks_line(ours)
    assert "cached below block 3" in frozen_blocks_line(ours)
    assert read(folder) == good


def test_ends_before_building_on_a_full_disk(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = prepared(tmp_path, "stream")
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(2**30, 2**30, 2**20))
    with pytest.raises(MachineError, match="no room for"):
        train(ours)
    assert not list(cache.iterdir())


def test_ends_in_one_line_when_the_disk_fills_up(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = prepared(tmp_path, "stream")
    add = OutputWriter.add

    def full(writer: OutputWriter, *arguments: Any) -> None:
        if [folder for folder in cache.iterdir() if folder.name[0] != "."]:
            raise OSError(28, "No space left on device")
        add(writer, *arguments)

    monkeypatch.setattr(OutputWriter, "add", full)
    with pytest.raises(MachineError, match=r"stream needs disk: .*No space left"):
        train(ours)
    assert len(list(cache.iterdir())) == 1, "the first block's outputs, from which a next run goes on"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "every block trains": ({"method": {"kind": "full", "lr": 0.01}}, "trains the lowest one; try"),
    "the last stage reaches all": (
        {"method": {"kind": "gradual", "reaches": [1, "all"], "lr": 0.01}},
        "trains the lowest one; try auto",
    ),
    "4bit": (
        {"quantize": "4bit", "method": {**FROZEN, "adapter": LORA}},
        "stream quantizes no block that it reads; try cache",
    ),
    "several processes": (
        {"launch": {"accelerate": "multi_cpu", "processes": 2}},
        "stream is for one process with whole weights; try auto",
    ),
    "too large": (
        {"memory": {"frozen_blocks": "stream", "cache_limit_gb": 0.0001}},
        r"stream needs [\d.]+ [kM]B of disk, for the outputs of two blocks at a time; try 0.01",
    ),
    "dropout": ({"kind": "gpt2"}, r"embd_pdrop is 0\.1|drop\.p is 0\.1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_cannot_be_streamed(tmp_path: Path, case: str) -> None:
    sections, message = dict(REFUSED[case][0]), REFUSED[case][1]
    if "kind" in sections:
        tiny.save_base(tmp_path / "base", str(sections.pop("kind")), blocks=4)
    if "quantize" in sections:
        sections["model"] = {"base": str(tmp_path / "base"), "quantize": sections.pop("quantize"), "precision": "fp32"}
    with pytest.raises(RecipeError, match=message) as caught:
        prepared(tmp_path, "stream", **sections)
    assert "\n" not in str(caught.value)
    key = "memory.cache_limit_gb" if case == "too large" else "memory.frozen_blocks"
    assert f": {key}: " in str(caught.value)
