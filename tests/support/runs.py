"""A finished run on a tiny model without its training: a delta with known random content."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmtune import recipe
from llmtune.adapters.delta import save_delta
from llmtune.adapters.insert import insert, trained_tensors
from llmtune.merge import proof
from llmtune.model.base import load_model, locate_base, model_facts
from llmtune.run import Run
from llmtune.train.prepare import prepare
from tests.support import tiny

LORA = {"kind": "full", "lr": 1e-3, "adapter": {"kind": "lora", "rank": 4, "alpha": 8}}


def trained(
    folder: Path, method: dict[str, Any] | None = None, kind: str = "llama", step: float = 0.05, **more: Any
) -> Run:
    """A run folder as training leaves it; every trained tensor is moved by noise of size `step`."""
    size = {key: more.pop(key) for key in ("tied", "hidden", "blocks") if key in more}
    base = more.pop("base", None) or tiny.save_base(folder / "base", kind, **size)
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.sums(20))
    file = tiny.write_recipe(folder / "recipe.json", base, rows, method or LORA, **more)
    return perturbed(prepare(recipe.load(file), folder / "run", 0), step)


def perturbed(made: Run, step: float = 0.05) -> Run:
    """The run with a delta that differs from the base by noise of size `step`."""
    settings = made.recipe()
    base = locate_base(settings.model)
    weights = load_model(base)
    plan = settings.plan(model_facts(weights))
    tuned = insert(weights, settings.method.adapter, plan, base)
    generator = torch.Generator().manual_seed(7)
    tensors = trained_tensors(tuned, plan)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=step)
    save_delta(tuned, dict(tensors), made.delta, base, settings.method.adapter.kind)
    made.mark("train", [made.delta])
    return made


def reload_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the stock loader's script in this process from now on, which saves its start-up."""

    def run(arguments: list[str], input: str, **_: Any) -> subprocess.CompletedProcess[str]:
        said = io.StringIO()
        monkeypatch.setattr(sys, "stdin", io.StringIO(input))
        with contextlib.redirect_stdout(said):
            exec(arguments[-1], {})
        return subprocess.CompletedProcess(arguments, 0, said.getvalue(), "")

    monkeypatch.setattr(proof, "subprocess", SimpleNamespace(run=run))
