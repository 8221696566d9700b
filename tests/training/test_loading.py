"""Where the base is loaded, and when its weights are hashed."""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune import recipe as recipes
from llmtune.machine import processes
from llmtune.model.base import Base, load_model
from llmtune.training import loop
from llmtune.training.stages.groups import hold_in_fp32
from tests.support import tiny

GPU, CPU = torch.device("cuda", 1), torch.device("cpu")


@dataclass
class _Layout:
    """As much of a layout as loading needs."""

    boundaries: list[int] = field(default_factory=lambda: [2])
    linear: tuple[list[str], list[str]] = ([], [])
    bits: int | None = 4


def a_recipe(folder: Path, **sections: Any) -> recipes.Recipe:
    """A recipe for a base that is not there."""
    return recipes.load(tiny.write_recipe(folder / "recipe.yaml", folder, folder / "rows.jsonl", **sections))


@pytest.mark.parametrize("quantize", ["none", "4bit"])
@pytest.mark.parametrize(
    ("device", "sharded", "expected"), [(GPU, "false", GPU), (GPU, "true", None), (CPU, "false", None)]
)
def test_weights_go_straight_to_the_gpu_but_where_they_are_sharded(
    tmp_path: Path,
    quantize: str,
    device: torch.device,
    sharded: str,
    expected: torch.device | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", sharded)
    monkeypatch.setattr(loop, "load_model", lambda base, dtype, device: device)
    monkeypatch.setattr(loop, "load_quantized", lambda base, linear, dtype, device, bits: device)
    section = {"base": str(tmp_path), "quantize": quantize}
    recipe = a_recipe(tmp_path, model=section, method={"kind": "frozen", "reach": 1, "lr": 0.1})
    layout: Any = _Layout()
    assert loop._load(Base(tmp_path, "base", None, None), recipe, layout, torch.float32, device) == (expected, None)


def _resident(file: Path) -> int:
    """Kibibytes of a file that are mapped into this process and in memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes pages back")
def test_weights_in_16_bits_leave_memory_when_they_train_in_fp32(tmp_path: Path) -> None:
    stored = tiny.model(hidden=128, blocks=3).to(torch.bfloat16)
    stored.save_pretrained(tmp_path)
    model = load_model(Base(tmp_path, "base", None, None), torch.bfloat16)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    full = _resident(tmp_path / "model.safetensors")
    trained = dict(model.model.layers[1:].named_parameters())
    hold_in_fp32(model, trained.values())
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert all(torch.equal(one, now.bfloat16()) for one, now in zip(before, model.parameters(), strict=True))
    left = _resident(tmp_path / "model.safetensors")
    size = sum(parameter.numel() for parameter in trained.values()) * 2 // 1024
    assert 0 < left < full - 0.7 * size  # a page at each end of a tensor stays


def frozen_blocks(tmp_path: Path, layout: _Layout, revision: str | None = None, **sections: Any) -> Any:
    """The cache of frozen blocks that a training would use."""
    laid: Any = layout
    base = Base(tmp_path, "base", revision, None)
    return loop._frozen_blocks(a_recipe(tmp_path, **sections), base, laid, [], None, torch.float32, None)


def test_hashes_weights_only_where_outputs_may_be_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = list[str]()

    def digest(base: Base) -> str:
        hashed.append(base.name)
        return "digest"

    monkeypatch.setattr(loop, "weights_digest", digest)
    assert frozen_blocks(tmp_path, _Layout([0])) is None
    assert frozen_blocks(tmp_path, _Layout(), memory={"frozen_blocks": "recompute"}) is None
    assert frozen_blocks(tmp_path, _Layout(), revision="commit") is not None
    assert hashed == []
    assert frozen_blocks(tmp_path, _Layout([0, 2]))._policy.facts["base"] == "digest"
    assert hashed == ["base"]
    monkeypatch.setattr(processes, "is_first_here", lambda: False)
    monkeypatch.setattr(processes, "gather", lambda value: ["of the first", value])
    assert frozen_blocks(tmp_path, _Layout())._policy.facts["base"] == "of the first"
    assert hashed == ["base"]
