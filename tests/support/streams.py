"""Runs with memory.frozen_blocks: stream on a tiny base, and what to compare of them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llmtune import recipe
from llmtune.frozen.store import DATA
from llmtune.run import Run
from llmtune.train.prepare import prepare
from tests.support import tiny

FROZEN = {"kind": "frozen", "reach": 1, "lr": 0.01}
LORA = {"kind": "lora", "rank": 4, "alpha": 8}
STAGED = {"kind": "staged", "stages": [{"until": 0.5, "reach": 1, "lr": 0.01}, {"until": 1.0, "reach": 2, "lr": 0.01}]}
NARROWING = {
    "kind": "staged",
    "stages": [{"until": 0.5, "reach": 2, "lr": 0.01}, {"until": 1.0, "reach": 1, "lr": 0.01}],
}
CALM = {"gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}}
KINDS = ["llama", "gpt2", "gpt_neox", "gemma3_text", "mixtral"]


def made(tmp_path: Path, how: str, method: Any = None, kind: str = "llama", name: str = "", **sections: Any) -> Run:
    """A prepared run on a tiny base of four blocks, with memory.frozen_blocks: `how`."""
    base = tmp_path / "base"
    if not base.exists():
        tiny.save_base(base, kind, blocks=4, **CALM.get(kind, {}))
    data = tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(24))
    name = name or how
    sections.setdefault("memory", {"frozen_blocks": how})
    sections.setdefault("train", {"epochs": 2, "batch_size": 4, "keep": 9})
    written = tiny.write_recipe(tmp_path / f"{name}.yaml", base, data, method or FROZEN, **sections)
    return prepare(recipe.load(written), tmp_path / name, gpus=0)


def log(done: Run) -> list[dict[str, Any]]:
    """The losses and gradient norms that a run recorded."""
    records = [json.loads(line) for line in done.log_file.read_text().splitlines()]
    found = [
        {key: entry[key] for key in ("step", "loss", "eval_loss", "grad_norm") if key in entry} for entry in records
    ]
    return [entry for entry in found if len(entry) > 1]


def losses(done: Run) -> list[float]:
    """The training losses that a run recorded."""
    return [entry["loss"] for entry in log(done) if "loss" in entry]


def said(done: Run) -> str:
    """What a run says of its prefix."""
    records = [json.loads(line) for line in done.log_file.read_text().splitlines()]
    return next(record["frozen_blocks"] for record in records if "frozen_blocks" in record)


def delta(done: Run) -> dict[str, torch.Tensor]:
    """The tensors of a run's delta."""
    return load_file(next(done.delta.glob("*.safetensors")))


def assert_same(ours: Run, other: Run) -> None:
    """Two runs have the same losses and the same delta, bit by bit."""
    assert log(ours) == log(other)
    stored = delta(other)
    assert set(delta(ours)) == set(stored)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in delta(ours).items())


def read(folder: Path) -> bytes:
    """The states in a folder."""
    return (folder / DATA).read_bytes()
