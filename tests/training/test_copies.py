"""Trainings on CPUs that cast each weight once a step: losses, gradients and weights of those that cast at each use."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.data.batches.passes import PassLimits
from llmtune.kernels.cpu.copies import WeightCopies
from llmtune.run_log import Record
from tests.support import tiny, training
from tests.support.training import GRADUAL, LORA, METHODS

FULL = METHODS["full"]
TIED: dict[str, Any] = {"tied": True}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "full, tied, in passes": (FULL, TIED, {"limits": PassLimits(2)}),
    "full, validated each step": (FULL, {}, {"eval_strategy": "steps", "eval_steps": 1}),
    "full, clipped, accumulated": (FULL, {}, {"max_grad_norm": 0.1, "gradient_accumulation_steps": 2}),
    "full, checkpointing": (FULL, {}, {"gradient_checkpointing": True}),
    "full, 8 bits": (FULL, {"hidden": 64}, {"optim": "adamw_bnb_8bit"}),
    "gradual": (GRADUAL, TIED, {}),
    "discriminative": ({"kind": "discriminative", "lr": 0.01}, {}, {}),
    "lisa": ({"kind": "lisa", "blocks": 1, "every": 2, "lr": 0.01}, {}, {}),
    "lora": ({**FULL, "adapter": LORA}, {}, {}),
}


def fit(
    out: Path, method: dict[str, Any], shape: dict[str, Any], copies: bool, resume: str | None = None, **more: Any
) -> tuple[list[Record], list[training.Snapshot], training.Snapshot]:
    """The log, every step's gradients, and the weights after a training in bf16."""
    watch, log = training.Watch(), list[Record]()
    settings = {"model": tiny.model(**{"blocks": 3, "tied": False, **shape}), "bf16": True, "copies": copies, **more}
    settings |= {"eval_data": training.rows(3, seed=5)} if "eval_strategy" in more else {}
    trainer = training.trainer(out, method, callbacks=[watch], record=log.append, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return log, watch.gradients, training.snapshot(trainer.model)


def assert_equal_bits(ours: tuple[Any, Any, Any], plain: tuple[Any, Any, Any]) -> None:
    for log in (ours[0], plain[0]):
        for entry in log:
            entry.pop("memory", None)
    assert ours[0] == plain[0]
    for mine, other in zip([*ours[1], ours[2]], [*plain[1], plain[2]], strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())


@pytest.mark.parametrize("case", CASES)
def test_copies_of_weights_change_no_bit(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, shape, more = CASES[case]
    plain = fit(tmp_path, method, shape, False, steps=4, **more)
    used, get = list[bool](), WeightCopies.get

    def noted(self: WeightCopies, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        copy = get(self, weight, dtype)
        used.append(copy is not None)
        return copy

    monkeypatch.setattr(WeightCopies, "get", noted)
    assert_equal_bits(fit(tmp_path, method, shape, True, steps=4, **more), plain)
    assert any(used)


def test_resumed_training_begins_with_copies_of_what_it_loaded(tmp_path: Path) -> None:
    saves: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "steps": 5}
    whole = fit(tmp_path / "out", FULL, TIED, True, **saves)
    log, gradients, weights = fit(tmp_path / "out", FULL, TIED, True, str(tmp_path / "out" / "step-000003"), **saves)
    assert_equal_bits((log, gradients, weights), (whole[0][-len(log) :], whole[1][3:], whole[2]))
