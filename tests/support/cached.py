"""Trainings with and without cached outputs of frozen blocks, and what makes two of them equal."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from llmtune.frozen.cache import CachePolicy, FrozenBlocks
from tests.support import training

LORA = {"kind": "lora", "rank": 4, "alpha": 8}


GRADUAL = {"kind": "gradual", "reaches": [1, 2, "all"], "lr": 0.1}


CALM = {
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "opt": {"dropout": 0.0},
}


KINDS = ["llama", "gpt2", "mixtral"]


KINDS += [
    pytest.param(kind, marks=pytest.mark.slow)
    for kind in ("qwen3", "gemma2", "gemma3_text", "gpt_neox", "opt", "falcon")
]


class Gradients(TrainerCallback):
    """Keeps the gradients of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **named: Any) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def fit(
    tmp_path: Path,
    method: dict[str, Any],
    *,
    keep: bool = True,
    always: bool = False,
    limit: int = 2**30,
    resume: str | None = None,
    **more: Any,
) -> tuple[str, list[dict[str, Any]], list[dict[str, torch.Tensor]], Any]:
    """What was said of the frozen_blocks, the log, the gradients of every step, and the trainer."""
    data = [row | {"index": index} for index, row in enumerate(training.rows(24))]
    held = [row | {"index": 24 + index} for index, row in enumerate(training.rows(5, seed=3))]
    keeping = CachePolicy(tmp_path / "cache", {"base": "tiny"}, method.get("adapter"), limit, always)
    kept = FrozenBlocks([row["input_ids"] for row in [*data, *held]], keeping) if keep else None
    watch, log = Gradients(), []
    settings = {"steps": 14, "optim": "sgd", "eval_data": held, "eval_strategy": "steps", "eval_steps": 7, **more}
    made = training.trainer(
        tmp_path / "out", method, data=data, frozen_blocks=kept, callbacks=[watch], record=log.append, **settings
    )
    made.train(resume_from_checkpoint=resume)
    said = [entry["frozen_blocks"] for entry in log if "frozen_blocks" in entry]
    return (said or [""])[0], [entry for entry in log if "frozen_blocks" not in entry], watch.steps, made


def assert_equal(ours: Any, plain: Any) -> None:
    """Losses and whole gradients of two fits are the same to 1e-6 at every step."""
    assert [entry.get("loss", entry.get("eval_loss")) for entry in ours[1]] == pytest.approx(
        [entry.get("loss", entry.get("eval_loss")) for entry in plain[1]], rel=1e-6
    )
    for mine, other in zip(ours[2], plain[2], strict=True):
        assert set(mine) == set(other)
        whole = torch.cat([gradient.flatten() for gradient in other.values()])
        apart = torch.cat([(mine[name] - gradient).flatten() for name, gradient in other.items()])
        assert apart.norm() <= 2e-6 * whole.norm()
