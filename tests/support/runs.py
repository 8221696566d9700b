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
from llmtune.adapters.delta import load_delta, save_delta
from llmtune.adapters.insert import insert, trained_tensors
from llmtune.merging import proof
from llmtune.model.base import load_model, model_facts
from llmtune.model.files.locate import locate_base
from llmtune.run import Run
from llmtune.training.prepare import prepare
from tests.support import tiny

LORA = {"kind": "full", "lr": 1e-3, "adapter": {"kind": "lora", "rank": 4, "alpha": 8}}
QUICK = {"suite": "quick", "shots": 2}


def trained(
    folder: Path, method: dict[str, Any] | None = None, kind: str = "llama", step: float = 0.05, **sections: Any
) -> Run:
    """Make a run folder as training leaves it; every trained tensor is moved by noise of size `step`.

    `tied`, `hidden` and `blocks` shape the base; other arguments are sections of the recipe.
    """
    size = {key: sections.pop(key) for key in ("tied", "hidden", "blocks") if key in sections}
    base = sections.pop("base", None) or tiny.save_base(folder / "base", kind, **size)
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.sums(20))
    file = tiny.write_recipe(folder / "recipe.json", base, rows, method or LORA, **sections)
    return perturbed(prepare(recipe.load(file), folder / "run", 0), step)


def with_held_out_rows(folder: Path, rows: list[dict[str, Any]] | None = None, **sections: Any) -> Run:
    """Make a trained run whose first five rows are its test rows, to be evaluated with two worked examples."""
    train = tiny.write_rows(folder / "train.jsonl", (rows or tiny.sums(30))[5:])
    test = tiny.write_rows(folder / "test.jsonl", (rows or tiny.sums(30))[:5])
    data = {"train": str(train), "eval_fraction": 0.2, "test": str(test)}
    return trained(folder, **{"data": data, "eval": QUICK, **sections})


def perturbed(run: Run, step: float = 0.05) -> Run:
    """Give a run a delta that differs from the base by noise of size `step`."""
    settings = run.recipe()
    base = locate_base(settings.model)
    weights = load_model(base)
    plan = settings.plan(model_facts(weights))
    tuned = insert(weights, settings.method.adapter, plan, base)
    generator = torch.Generator().manual_seed(7)
    tensors = trained_tensors(tuned, plan)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=step)
    save_delta(tuned, dict(tensors), run.delta, base, settings.method.adapter.kind)
    run.mark("train", [run.delta])
    return run


def load_tuned(run: Run) -> Any:
    """Load the tuned model of a run."""
    return load_delta(load_model(locate_base(run.recipe().model)), run.delta)


def reload_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the script of `load_with_stock_transformers` in this process from now on, which saves its start-up."""

    def run(arguments: list[str], input: str, **_: Any) -> subprocess.CompletedProcess[str]:
        output = io.StringIO()
        monkeypatch.setattr(sys, "stdin", io.StringIO(input))
        with contextlib.redirect_stdout(output):
            exec(proof.STOCK, {})
        return subprocess.CompletedProcess(arguments, 0, output.getvalue(), "")

    monkeypatch.setattr(proof, "subprocess", SimpleNamespace(run=run))
