"""TRL's DPOTrainer follows a plan through Planned, without a line of supervised fine-tuning."""

import copy
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from llmtune.model.base import model_facts
from llmtune.plan.schedule import Schedule
from llmtune.run_log import Record
from llmtune.training.checkpoint import complete_checkpoints
from llmtune.training.planned import Planned
from tests.support import tiny, training

STEPS, LR, WARMUP = 3, 0.01, 2
REACH = (1, 2, 5)
"""The farthest distance that trains at each step: a stage is one step long, and the embeddings are at 5."""


class PlannedDPO(Planned, DPOTrainer):
    """Direct preference optimization that follows a plan."""


def preferences() -> Dataset:
    """A handful of preference rows."""
    return Dataset.from_list(
        [
            {"prompt": f"{n} plus {n % 7}?", "chosen": str(n + n % 7), "rejected": f"{n}{n % 7}!" + "?" * (n % 3)}
            for n in range(12)
        ]
    )


def dpo(out: Path, log: list[Record], *callbacks: TrainerCallback, save: bool = False) -> PlannedDPO:
    """A DPO trainer of three steps under a gradual plan on a tiny model of four blocks."""
    model = tiny.model(blocks=4, tied=False)
    method = training.spec({"kind": "gradual", "reaches": [1, 2, "all"], "lr": LR, "bottom_ratio": 0.3}).method
    plan = method.plan(model_facts(model))
    arguments = DPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=4,
        max_steps=STEPS,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="steps" if save else "no",
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PlannedDPO(
        model,
        make_schedule=lambda steps: Schedule(plan, steps, WARMUP / STEPS, "linear"),
        tensors=dict(model.named_parameters()),
        record=log.append,
        keep=99,
        # DPOTrainer would load a second model by name, and this one has none on disk.
        ref_model=copy.deepcopy(model),
        args=arguments,
        train_dataset=preferences(),
        processing_class=tiny.tokenizer(),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def closed_form(step: int, distance: int) -> float:
    """The plan's rate at a step (0-based): stage rate x warm-up since the distance first trained x linear decay."""
    if distance > REACH[step]:
        return 0.0
    first = next(step for step, reach in enumerate(REACH) if distance <= reach)
    decay = 1 - max(0, step - WARMUP) / (STEPS - WARMUP)
    return LR * 0.3 ** (distance / 3) * min(1, (step - first + 1) / WARMUP) * decay


def test_dpo_trains_exactly_the_planned_tensors_at_the_planned_rates(tmp_path: Path) -> None:
    watch, rates, log = training.Watch(), training.Rates(), list[Record]()
    trainer = dpo(tmp_path, log, watch, rates)
    reference = {name: tensor.clone() for name, tensor in trainer.ref_model.named_parameters()}
    trainer.train()
    snapshots = [*watch.before, training.snapshot(trainer.model)]
    for step, reach in enumerate(REACH):
        planned = {name for name, distance in trainer.distance.items() if distance <= reach}
        changed = {name for name in snapshots[0] if not torch.equal(snapshots[step][name], snapshots[step + 1][name])}
        assert changed == planned, f"step {step + 1}"
        assert set(watch.gradients[step]) == planned, f"step {step + 1}"
        expected = {distance: closed_form(step, distance) for distance in range(6)}
        assert rates.used[step] == pytest.approx(expected, abs=1e-12)
        assert log[step]["lr"] == {str(distance): rate for distance, rate in rates.used[step].items()}
    assert len(rates.used) == len(log) == STEPS
    assert trainer.prove_changes() == []
    assert all(torch.equal(tensor, reference[name]) for name, tensor in trainer.ref_model.named_parameters())
    # The first step's policy is the reference, where the loss of two equal rewards is log 2.
    assert log[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert log[2]["loss"] < log[0]["loss"]


def test_dpo_optimizer_groups_are_the_plans(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, [])
    groups = trainer.create_optimizer().param_groups
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in trainer.model.parameters())
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    for group in groups:
        assert {trainer.distance[names[id(parameter)]] for parameter in group["params"]} == {group["distance"]}
    assert {group["distance"] for group in groups} == set(range(6))


@pytest.mark.slow
def test_dpo_checkpoint_is_whole_and_resume_gives_equal_weights(tmp_path: Path) -> None:
    log: list[Record] = []
    trainer = dpo(tmp_path / "whole", log, save=True)
    trainer.train()
    checkpoints = complete_checkpoints(tmp_path / "whole")
    assert [checkpoint.name for checkpoint in checkpoints] == ["step-000001", "step-000002", "step-000003"]
    assert sorted(folder.name for folder in (tmp_path / "whole").iterdir()) == [c.name for c in checkpoints]
    expected = trainer.trained_state()
    for step, checkpoint in enumerate(checkpoints[:-1], 1):
        again: list[Record] = []
        resumed = dpo(tmp_path / f"resumed-{step}", again, save=True)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert again == [entry for entry in log if entry["step"] > step]
        for name, tensor in resumed.trained_state().items():
            assert torch.equal(tensor, expected[name]), f"{name} after step {step}"
