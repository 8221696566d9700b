"""Every optimizer on offer follows the plan: what trains, at which rate, and the same after a resume."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate import PartialState
from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainerCallback

from llmtune.errors import MachineError
from llmtune.recipe.sections import Train
from llmtune.run_log import Record
from llmtune.training.arguments import OPTIMIZERS
from llmtune.training.checkpoint import complete_checkpoints
from llmtune.training.loop import train
from llmtune.training.objective import SupervisedTrainer
from tests.support import tiny, training

STAGES = [{"until": 0.34, "lr": 0.01}, {"until": 0.67, "reach": 1, "lr": 0.01}, {"until": 1.0, "reach": 2, "lr": 0.02}]
METHOD = {"kind": "staged", "stages": [{**stage, "decay": 0.5} for stage in STAGES]}
REACHES = [3, 3, 1, 1, 2, 2]
OFFERED: dict[str, dict[str, Any]] = {
    name: {"optim": kind} for name, kind in OPTIMIZERS.items() if name != "paged_adamw_8bit"
} | {"sgd with momentum": {"optim": "sgd", "optim_args": "momentum=0.9"}}


def fit(
    folder: Path, name: str, *callbacks: TrainerCallback, resume: Path | None = None, **more: Any
) -> tuple[SupervisedTrainer, list[Record]]:
    """The trainer after three stages on a model large enough for 8-bit states, and its log."""
    log: list[Record] = []
    settings = {"weight_decay": 0.1, "max_grad_norm": 1.0, "shape": "linear", **OFFERED[name], **more}
    model = tiny.model(blocks=2, hidden=64, tied=False)
    trainer = training.trainer(folder, METHOD, model=model, callbacks=callbacks, record=log.append, **settings)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer, log


def test_covers_every_optimizer_of_the_recipe() -> None:
    offered = get_args(Train.model_fields["optimizer"].annotation)
    assert set(offered) == set(OPTIMIZERS) == {*OFFERED, "paged_adamw_8bit"} - {"sgd with momentum"}


@pytest.mark.parametrize("name", OFFERED)
def test_changes_exactly_the_planned_tensors_at_the_planned_rates(tmp_path: Path, name: str) -> None:
    rates, watch = training.Rates(), training.Watch()
    small: dict[str, Any] = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer, log = fit(tmp_path, name, watch, rates, **small)
    snapshots, used = [*watch.before, training.snapshot(trainer.model)], rates.used
    for step, reach in enumerate(REACHES):
        planned = {name for name, distance in trainer.distance.items() if distance <= reach}
        changed = {name for name in snapshots[0] if not torch.equal(snapshots[step][name], snapshots[step + 1][name])}
        assert changed == planned, f"step {step + 1}"
        expected = {distance: trainer.schedule.rate(step, distance) for distance in used[step]}
        assert used[step] == pytest.approx(expected, abs=1e-12)
        assert log[step]["lr"] == {str(distance): rate for distance, rate in used[step].items()}
    assert len(used) == 6


@pytest.mark.parametrize("name", OFFERED)
def test_first_step_is_proportional_to_the_rate(tmp_path: Path, name: str) -> None:
    moves = []
    for lr in (0.001, 0.002):
        watch = training.Watch()
        model = tiny.model(blocks=2, hidden=64, tied=False)
        method = {"kind": "discriminative", "decay": 0.5, "lr": lr}
        trainer = training.trainer(tmp_path, method, model=model, steps=1, callbacks=[watch], **OFFERED[name])
        trainer.train()
        moves.append({key: p.detach() - watch.before[0][key] for key, p in trainer.model.named_parameters()})
    for key, move in moves[0].items():
        assert move.abs().max() > 0
        torch.testing.assert_close(moves[1][key], 2 * move, rtol=1e-3, atol=2e-7)
    if name != "sgd" and "momentum" not in name:
        largest = {key: float(move.abs().max()) for key, move in moves[0].items() if key.endswith("up_proj.weight")}
        first, last = (largest[f"model.layers.{index}.mlp.up_proj.weight"] for index in (0, 1))
        assert first / last == pytest.approx(0.5, rel=0.02 if "adam" in name else 0.6)


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFERED)
def test_accumulation_matches_one_batch(tmp_path: Path, name: str) -> None:
    ends = []
    for size, passes in ((8, 1), (2, 4)):
        trainer, _ = fit(tmp_path, name, per_device_train_batch_size=size, gradient_accumulation_steps=passes)
        ends.append(dict(trainer.model.named_parameters()))
    # An Adam step is the gradient's sign where the gradient is small: rounding there moves an element by the rate.
    tolerance = 1e-6 if "sgd" in name else 2e-3
    for key, tensor in ends[0].items():
        assert (tensor - ends[1][key]).abs().mean() < tolerance, key


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFERED)
def test_resume_at_a_stage_boundary_is_bit_equal(tmp_path: Path, name: str) -> None:
    every: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    whole, log = fit(tmp_path / "whole", name, **every)
    end = dict(whole.model.named_parameters())
    for checkpoint in complete_checkpoints(tmp_path / "whole")[1:5:2]:
        step = int(checkpoint.name.removeprefix("step-"))
        trainer, again = fit(tmp_path / "again", name, resume=checkpoint, **every)
        assert again == log[step:]
        assert all(torch.equal(p, end[key]) for key, p in trainer.model.named_parameters()), f"after step {step}"


def test_keeps_8bit_states_in_8_bits(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, "adamw_8bit")
    assert isinstance(trainer.optimizer, AcceleratedOptimizer)
    kinds = {state["state1"].dtype for state in trainer.optimizer.optimizer.state.values()}
    assert torch.uint8 in kinds


def test_keeps_states_of_embeddings_in_32_bits(tmp_path: Path) -> None:
    model = tiny.model(blocks=2, hidden=64, tied=False)
    embeddings = model.get_input_embeddings().weight
    trainer = training.trainer(tmp_path, training.METHODS["full"], model=model, steps=1, **OFFERED["adamw_8bit"])
    trainer.train()
    states = trainer.optimizer.state
    assert states[embeddings]["state1"].dtype == torch.float32
    assert states[model.get_output_embeddings().weight]["state1"].dtype == torch.uint8
    frozen = training.METHODS["frozen"]  # a later training in the same Python, whose first tensor is another one
    later = training.trainer(
        tmp_path, frozen, model=tiny.model(blocks=2, hidden=64, tied=False), steps=1, **OFFERED["adamw_8bit"]
    )
    later.train()
    large = [state["state1"].dtype for tensor, state in later.optimizer.state.items() if tensor.numel() >= 4096]
    assert torch.float32 not in large


class Optimizers(TrainerCallback):
    """Keeps the class name of the optimizer that trained."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def on_train_end(self, *_: object, optimizer: AcceleratedOptimizer, **named: object) -> None:
        self.names.append(type(optimizer.optimizer).__name__)


@pytest.mark.parametrize("name", ["adamw_8bit", "adafactor", "sgd", "paged_adamw_8bit"])
@pytest.mark.slow
def test_trains_with_the_recipes_optimizer(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save_base(tmp_path / "base", hidden=64)
    section = {"epochs": 1, "batch_size": 4, "optimizer": name}
    run, optimizers = training.prepare_run(tmp_path, training.METHODS["full"], count=20, train=section), Optimizers()
    if name == "paged_adamw_8bit":
        monkeypatch.setattr(
            "transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
        )
        assert PartialState().device.type == "cpu"
        with pytest.raises(MachineError, match="finds no GPU; adamw_8bit needs none"):
            train(run)
    else:
        train(run, callbacks=[optimizers])
        assert optimizers.names == [{"adamw_8bit": "AdamW", "adafactor": "Adafactor", "sgd": "SGD"}[name]]
