"""Bands: stages that leave the top frozen, trained and cached on a tiny model."""

import re
from pathlib import Path
from typing import Any

import torch

from tests.support import tiny, training
from tests.support.cached import LORA, assert_equal, fit

BAND: dict[str, Any] = {"kind": "staged", "stages": [{"until": 1.0, "nearest": 2, "reach": 3, "lr": 0.01}]}
MOVING: dict[str, Any] = {
    "kind": "staged",
    "stages": [
        {"until": 0.5, "nearest": 1, "reach": 1, "lr": 0.01},
        {"until": 1.0, "nearest": 2, "reach": 2, "lr": 0.01},
    ],
}


def far(name: str) -> int:
    """The distance of a parameter of the model of four blocks."""
    inside = re.search(r"layers\.(\d+)\.", name)
    return 4 - int(inside.group(1)) if inside else 5 if "embed_tokens" in name else 0


def test_exactly_the_band_changes(tmp_path: Path) -> None:
    watch = training.Watch()
    trainer = training.trainer(tmp_path, MOVING, callbacks=[watch])
    trainer.train()
    snapshots = [*watch.before, dict(trainer.model.named_parameters())]
    for step, distance in enumerate([1, 1, 1, 2, 2, 2]):
        before, after = snapshots[step], snapshots[step + 1]
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {name for name in before if far(name) == distance}, f"step {step + 1}"


def test_outputs_below_a_band_are_cached_and_equal_the_plain_paths(tmp_path: Path) -> None:
    for method in (BAND, {**BAND, "adapter": LORA}):
        model = tiny.model(blocks=4)
        cached = fit(tmp_path, method, model=model, always=True)
        assert "below block 1" in cached[0]
        assert_equal(cached, fit(tmp_path, method, model=tiny.model(blocks=4), keep=False))
