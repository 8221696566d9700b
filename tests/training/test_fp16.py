"""fp16: the loss is scaled; a step whose gradients overflow changes nothing, and plan, log and checkpoints go on."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.errors import MachineError
from llmtune.run_log import Record
from llmtune.training.distributed import check_device
from llmtune.training.objective import SupervisedTrainer
from tests.support.training import GRADUAL, LORA, METHODS, Rates, Snapshot, Watch, prepare_run, snapshot, trainer

SCALE, BACKOFF = 2.0**72, 2.0**-32
"""A scale at which two steps overflow, and the factor by which it falls after each."""


def scaled(out: Path, method: dict[str, Any], scale: float = SCALE, **more: Any) -> SupervisedTrainer:
    """A trainer in fp16 with a scaler, on the CPU, where accelerate gives none."""
    result = trainer(out, method, fp16=True, **more)
    result.accelerator.native_amp = True
    result.accelerator.scaler = torch.amp.GradScaler("cpu", scale, backoff_factor=BACKOFF, growth_interval=2)
    return result


def fit(out: Path, method: dict[str, Any], **more: Any) -> tuple[SupervisedTrainer, list[Snapshot], list[Record]]:
    """The trainer in fp16 after training, the parameters before each step and at the end, and the steps' records."""
    watch, log = Watch(), list[Record]()
    result = scaled(out, method, callbacks=[watch, *more.pop("callbacks", [])], record=log.append, **more)
    result.train()
    return result, [*watch.before, snapshot(result.model)], [entry for entry in log if "loss" in entry]


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "sgd"])
def test_skipped_steps_leave_weights_rates_and_stages_on_plan(tmp_path: Path, optimizer: str) -> None:
    """Fused AdamW skips steps by itself, others are skipped by the scaler."""
    rates = Rates()
    result, weights, steps = fit(tmp_path, GRADUAL, steps=9, shape="cosine", callbacks=[rates], optim=optimizer)
    skipped = [True, True, *[False] * 7]
    assert [entry["step"] for entry in steps] == list(range(1, 10))
    assert [entry.get("skipped", False) for entry in steps] == skipped
    assert all(math.isfinite(entry["loss"]) for entry in steps)
    schedule = result.schedule
    for step, used in enumerate(rates.used):
        assert used == {distance: schedule.rate(step, distance) for distance in used}, step
        before, after = weights[step], weights[step + 1]
        moved = {result.distance[name] for name in before if not before[name].equal(after[name])}
        trains = {distance for distance in set(result.distance.values()) if schedule.rate(step, distance) > 0}
        assert moved == (set() if skipped[step] else trains), step
    assert all(tensor.dtype is torch.float32 for tensor in result.current_tensors().values())
    result.prove_changes()


def test_the_share_of_changed_elements_is_measured_after_skipped_steps(tmp_path: Path) -> None:
    _, _, steps = fit(tmp_path, METHODS["full"], steps=4)
    assert [entry["step"] for entry in steps if "changed" in entry] == [3]
    assert steps[2]["changed"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_losses_in_fp16_follow_those_in_fp32(tmp_path: Path, adapter: dict[str, Any] | None) -> None:
    method = {"kind": "full", "lr": 0.01} | ({"adapter": adapter} if adapter else {})
    plain = trainer(tmp_path / "fp32", method, record=(log := list[Record]()).append)
    plain.train()
    _, _, steps = fit(tmp_path / "fp16", method, scale=2.0**10)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert max(losses) - min(losses) > 0.01
    assert [entry["loss"] for entry in steps] == pytest.approx(losses, abs=0.005)


@pytest.mark.slow
def test_resumes_with_the_scale_that_it_had(tmp_path: Path) -> None:
    """Saved after the skipped steps and before the scale grows; a new scaler would overflow again."""
    options: dict[str, Any] = {"steps": 6, "save_strategy": "steps", "save_steps": 3}
    through, weights, steps = fit(tmp_path / "run", METHODS["full"], **options)
    checkpoint = tmp_path / "run" / "step-000003"
    assert "scaler.pt" in json.loads((checkpoint / "manifest.json").read_text())
    log = list[Record]()
    resumed = scaled(tmp_path / "again", METHODS["full"], record=log.append, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.accelerator.scaler.state_dict() == through.accelerator.scaler.state_dict()
    assert [entry["loss"] for entry in log if "loss" in entry] == [entry["loss"] for entry in steps[3:]]
    for name, tensor in snapshot(resumed.model).items():
        assert tensor.equal(weights[-1][name]), name


def test_fp16_is_refused_on_cpus(tmp_path: Path) -> None:
    run = prepare_run(tmp_path, METHODS["full"], model={"base": str(tmp_path / "base"), "precision": "fp16"})
    with pytest.raises(MachineError, match="precision: fp16 is for GPUs, and there is none; try auto, bf16 or fp32"):
        check_device(run.recipe(), torch.device("cpu"))
