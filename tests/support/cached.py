"""Trainings with and without cached outputs of frozen blocks, and what makes two of them equal."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.frozen.cache import CachePolicy, FrozenBlocks
from llmtune.run_log import Record
from llmtune.training.objective import SupervisedTrainer
from tests.support import training

LORA = training.LORA
GRADUAL = {"kind": "gradual", "reaches": [1, 2, "all"], "lr": 0.1}
CALM: dict[str, dict[str, Any]] = {
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "opt": {"dropout": 0.0},
}
"""Settings without dropout, for architectures that have some."""
KINDS: list[Any] = ["llama", "gpt2", "mixtral"]
KINDS += [
    pytest.param(kind, marks=pytest.mark.slow)
    for kind in ("qwen3", "gemma2", "gemma3_text", "gpt_neox", "opt", "falcon")
]
Fit = tuple[str, list[Record], list[dict[str, torch.Tensor]], SupervisedTrainer]
"""What was recorded of the frozen blocks, the log, the gradients of every step, and the trainer."""


def fit(
    tmp_path: Path,
    method: dict[str, Any],
    *,
    keep: bool = True,
    always: bool = False,
    limit: int = 2**30,
    resume: str | None = None,
    **more: Any,
) -> Fit:
    """Train 14 steps, with the outputs of frozen blocks cached unless `keep` is false."""
    data = [row | {"index": index} for index, row in enumerate(training.rows(24))]
    eval_data = [row | {"index": 24 + index} for index, row in enumerate(training.rows(5, seed=3))]
    policy = CachePolicy(tmp_path / "cache", {"base": "tiny"}, method.get("adapter"), limit, always)
    frozen_blocks = FrozenBlocks([row["input_ids"] for row in [*data, *eval_data]], policy) if keep else None
    watch, log = training.Watch(), list[Record]()
    settings = {"steps": 14, "optim": "sgd", "eval_data": eval_data, "eval_strategy": "steps", "eval_steps": 7, **more}
    trainer = training.trainer(
        tmp_path / "out",
        method,
        data=data,
        frozen_blocks=frozen_blocks,
        callbacks=[watch],
        record=log.append,
        **settings,
    )
    trainer.train(resume_from_checkpoint=resume)
    messages = [entry["frozen_blocks"] for entry in log if "frozen_blocks" in entry]
    numbers = [entry for entry in log if "frozen_blocks" not in entry]
    return (messages or [""])[0], numbers, watch.gradients, trainer


def assert_equal(ours: Fit, plain: Fit) -> None:
    """Losses and whole gradients of two fits are the same to 1e-6 at every step."""
    losses = [
        [entry.get("loss", entry.get("eval_loss")) for entry in result[1] if "rows" not in entry]
        for result in (ours, plain)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for mine, other in zip(ours[2], plain[2], strict=True):
        assert set(mine) == set(other)
        whole = torch.cat([gradient.flatten() for gradient in other.values()])
        apart = torch.cat([(mine[name] - gradient).flatten() for name, gradient in other.items()])
        assert apart.norm() <= 2e-6 * whole.norm()
