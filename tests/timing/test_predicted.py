"""The seconds that a training will take: known before it begins on CPUs and known cards, and of no effect on it."""

from pathlib import Path

import pytest
import torch

from llmtune.estimate.lengths import Lengths
from llmtune.timing import predicted, rate
from llmtune.timing.predicted import run_seconds, time_record
from llmtune.timing.seconds import Work
from llmtune.training.prepare import layout_of
from tests.support import training

WORK = Work(Lengths(rows=16, longest=30, tokens=400, supervised=0.3, counted=True), validation=4)


def test_time_is_predicted_where_the_rate_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = training.prepare_run(tmp_path, training.GRADUAL, train={"epochs": 1, "batch_size": 4})
    recipe, layout = run.recipe(), layout_of(run.recipe())

    def asked(device: str, world: int = 1, checkpointing: bool = False) -> float | None:
        return run_seconds(run, recipe, layout, WORK, torch.device(device), world, 200, checkpointing)

    monkeypatch.setattr(predicted, "cpu_rate", lambda *_, **__: 1e9)
    on_cpu, again = asked("cpu"), asked("cpu", checkpointing=True)
    assert on_cpu is not None
    assert again is not None
    assert 0 < on_cpu < again  # activations that are computed again
    assert asked("cpu", world=2) is None
    assert asked("meta") is None
    monkeypatch.setattr(predicted, "card_rate", lambda device: 1e6)
    slow, shared = asked("cuda"), asked("cuda", world=2)
    assert slow is not None
    assert shared == pytest.approx(slow / 2)
    run.plan_file.write_text("{")
    assert asked("cpu") is None


def test_measuring_the_rate_draws_nothing_from_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.random.get_rng_state()
    assert rate._measure((8, 8), torch.float32) > 0
    assert torch.equal(torch.random.get_rng_state(), before)


def test_tells_predicted_beside_measured() -> None:
    record = time_record(40, 123.0, 140.4)
    assert record["time"] == "time: predicted about 2:03, measured 2:20"
    assert (record["predicted_seconds"], record["measured_seconds"], record["step"]) == (123.0, 140.4, 40)
