"""Runs with memory.frozen_blocks: stream on a tiny base, and the results to compare."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llmtune import recipe
from llmtune.frozen.store import DATA
from llmtune.run import Run
from llmtune.training.prepare import prepare
from tests.support import tiny

FROZEN = {"kind": "frozen", "reach": 1, "lr": 0.01}
LORA = {"kind": "lora", "rank": 4, "alpha": 8}
STAGED = {"kind": "staged", "stages": [{"until": 0.5, "reach": 1, "lr": 0.01}, {"until": 1.0, "reach": 2, "lr": 0.01}]}
NARROWING = {
    "kind": "staged",
    "stages": [{"until": 0.5, "reach": 2, "lr": 0.01}, {"until": 1.0, "reach": 1, "lr": 0.01}],
}
CALM: dict[str, dict[str, Any]] = {"gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}}
KINDS = ["llama", "gpt2", "gpt_neox", "gemma3_text", "mixtral"]


def prepared(
    tmp_path: Path,
    frozen_blocks: str,
    method: dict[str, Any] | None = None,
    kind: str = "llama",
    name: str = "",
    **sections: Any,
) -> Run:
    """A prepared run on a tiny base of four blocks, with that setting of memory.frozen_blocks."""
    base = tmp_path / "base"
    if not base.exists():
        tiny.save_base(base, kind, blocks=4, **CALM.get(kind, {}))
    data = tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(24))
    name = name or frozen_blocks
    sections.setdefault("memory", {"frozen_blocks": frozen_blocks})
    sections.setdefault("train", {"epochs": 2, "batch_size": 4, "keep": 9})
    file = tiny.write_recipe(tmp_path / f"{name}.yaml", base, data, method or FROZEN, **sections)
    return prepare(recipe.load(file), tmp_path / name, gpus=0)


def results(run: Run) -> list[dict[str, float]]:
    """The losses and gradient norms that a run recorded."""
    records = [json.loads(line) for line in run.log_file.read_text().splitlines()]
    keys = ("step", "loss", "eval_loss", "grad_norm")
    numbers = [{key: record[key] for key in keys if key in record} for record in records]
    return [entry for entry in numbers if len(entry) > 1]


def losses(run: Run) -> list[float]:
    """The training losses that a run recorded."""
    return [entry["loss"] for entry in results(run) if "loss" in entry]


def frozen_blocks_line(run: Run) -> str:
    """The line on frozen blocks in a run's log."""
    records = [json.loads(line) for line in run.log_file.read_text().splitlines()]
    return next(record["frozen_blocks"] for record in records if "frozen_blocks" in record)


def delta(run: Run) -> dict[str, torch.Tensor]:
    """The tensors of a run's delta."""
    return load_file(next(run.delta.glob("*.safetensors")))


def assert_same(ours: Run, other: Run) -> None:
    """Two runs have the same losses and the same delta, bit by bit."""
    assert results(ours) == results(other)
    mine, others = delta(ours), delta(other)
    assert set(mine) == set(others)
    assert all(torch.equal(tensor, others[name]) for name, tensor in mine.items())


def read(folder: Path) -> bytes:
    """The outputs in a folder of the cache."""
    return (folder / DATA).read_bytes()
