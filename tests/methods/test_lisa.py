"""LISA trained on tiny models: what moves, what the optimizer keeps, how it resumes, what refuses it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from llmtune import cli, recipe, terminal
from llmtune.adapters.delta import load_delta
from llmtune.errors import RecipeError, TrainingError
from llmtune.model.base import load_model
from llmtune.model.files.locate import locate_base
from llmtune.plan.distances import Drawn
from llmtune.plan.table import PlanTable
from llmtune.reporting.page import report
from llmtune.run import Run
from llmtune.training.checkpoint import complete_checkpoints
from llmtune.training.loop import train
from llmtune.training.prepare import prepare
from llmtune.training.proof import prove_planned_changes
from tests.support import tiny, training

LISA = {"kind": "lisa", "blocks": 1, "every": 2, "lr": 0.01}
LORA = {"kind": "lora", "rank": 4, "alpha": 8}
GRADUAL = {"kind": "gradual", "reaches": [1, 2, "all"], "lr": 0.01}
NARROWING = {"kind": "staged", "stages": [{"until": 0.5, "lr": 0.01}, {"until": 1.0, "reach": 1, "lr": 0.01}]}
STEPS = 8
DRAWS = [1, 1, 1, 1, 2, 2, 3, 3]
"""The block that seed 0 draws at each step, among four."""


class States(TrainerCallback):
    """Keeps the names of the parameters that have an optimizer state after each step, and of those that trained."""

    def __init__(self) -> None:
        self.kept: list[set[str]] = []
        self.trained: list[set[str]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **named: Any) -> None:
        self.trained.append({name for name, p in model.named_parameters() if p.grad is not None})

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **named: Any
    ) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.kept.append({names[id(parameter)] for parameter in optimizer.state})


def far(name: str) -> int:
    """The distance of a parameter of the model of four blocks."""
    inside = re.search(r"layers\.(\d+)\.", name)
    return 4 - int(inside.group(1)) if inside else 5 if "embed_tokens" in name else 0


@pytest.mark.parametrize("adapter", ["none", LORA], ids=["none", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_exactly_the_drawn_blocks_and_the_ends_change_at_every_step(
    tmp_path: Path, adapter: Any, checkpointing: bool
) -> None:
    watch = training.Watch()
    method = {**LISA, "adapter": adapter}
    trainer = training.trainer(
        tmp_path, method, steps=STEPS, callbacks=[watch], gradient_checkpointing=checkpointing, weight_decay=0.1
    )
    trainer.train()
    end = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    snapshots = [*watch.before, end]
    for step, block in enumerate(DRAWS):
        now = {0, block, 5} if adapter == "none" else {block}
        planned = {name for name in end if far(name) in now and (adapter == "none" or "lora" in name)}
        moved = {name for name in end if not torch.equal(snapshots[step][name], snapshots[step + 1][name])}
        assert moved == planned, f"step {step + 1}"


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "adamw_bnb_8bit", "adafactor"])
@pytest.mark.parametrize("adapter", ["none", LORA], ids=["none", "lora"])
def test_optimizer_keeps_states_only_of_what_trains(tmp_path: Path, adapter: Any, optim: str) -> None:
    states = States()
    trainer = training.trainer(tmp_path, {**LISA, "adapter": adapter}, steps=STEPS, callbacks=[states], optim=optim)
    trainer.train()
    assert states.kept == states.trained
    assert len(states.kept) == STEPS
    counts = [sum("layers." in name for name in names) for names in states.kept]
    assert counts == [9 if adapter == "none" else 14] * STEPS
    assert len({frozenset(names) for names in states.kept}) == len(set(DRAWS))


@pytest.mark.parametrize("method", [GRADUAL, NARROWING], ids=["gradual", "narrowing"])
def test_methods_that_do_not_draw_keep_every_state(tmp_path: Path, method: dict[str, Any]) -> None:
    states = States()
    training.trainer(tmp_path, method, callbacks=[states]).train()
    ever: set[str] = set()
    for kept, trained in zip(states.kept, states.trained, strict=True):
        ever |= trained
        assert kept == ever
    assert states.kept[-1] != states.trained[-1] or method is GRADUAL


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", LORA], ids=["none", "lora"])
def test_resumed_inside_and_between_draws_ends_bit_equal(tmp_path: Path, adapter: Any) -> None:
    method = {**LISA, "adapter": adapter, "every": 3}
    settings: dict[str, Any] = {"shape": "cosine", "warmup": 0.2, "save_strategy": "steps", "save_steps": 1}
    log: list[dict[str, Any]] = []
    whole = training.trainer(tmp_path / "whole", method, steps=STEPS, record=log.append, **settings)
    whole.train()
    end = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    for checkpoint in complete_checkpoints(tmp_path / "whole")[1:6]:
        step = int(checkpoint.name.removeprefix("step-"))
        stored = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
        again: list[dict[str, Any]] = []
        other = training.trainer(tmp_path / "again", method, steps=STEPS, record=again.append, **settings)
        trained = [name for name in other.current_tensors() if other._make_schedule(STEPS).trains(step - 1, far(name))]
        assert len(stored) == len(trained), f"after step {step}"
        other.train(resume_from_checkpoint=str(checkpoint))
        assert again == log[step:]
        live = dict(other.model.named_parameters())
        assert all(torch.equal(live[name], end[name]) for name in end), f"after step {step}"


def run_of(tmp_path: Path, method: dict[str, Any], **sections: Any) -> Run:
    """A prepared run on a base of four blocks, of 8 optimizer steps."""
    if not (tmp_path / "base").exists():
        tiny.save_base(tmp_path / "base", blocks=4, tied=False)
    rows = tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(40))
    file = tiny.write_recipe(tmp_path / "recipe.yaml", tmp_path / "base", rows, method, **sections)
    return prepare(recipe.load(file), tmp_path / "run", gpus=0)


def test_run_trains_merges_and_leaves_undrawn_blocks(tmp_path: Path) -> None:
    run = run_of(tmp_path, LISA)
    train(run)
    stored = load_file(run.delta / "trained.safetensors")
    base = locate_base(run.recipe().model)
    before = dict(load_model(base).named_parameters())
    changed = {far(name) for name, tensor in stored.items() if not torch.equal(tensor, before[name])}
    assert changed == {0, 1, 2, 3, 5}
    load_delta(load_model(base), run.delta)
    plan = PlanTable.read(run.plan_file)
    assert plan.trained == sum(tensor.numel() for name, tensor in stored.items() if far(name) != 4)
    done = run.manifest()["steps"]["train"]
    assert (done["steps"], done["trained"]) == (plan.steps, plan.trained)
    assert plan.steps == STEPS
    report(run)
    assert "LISA: 1 of 4 blocks, drawn anew every 2 steps at one rate" in run.report_file.read_text()


def test_fails_when_an_undrawn_block_changed(tmp_path: Path) -> None:
    model = tiny.model(blocks=4)
    before = dict.fromkeys((name for name, _ in model.named_parameters()), -1)
    names = [name for name in before if far(name) != 4]
    with pytest.raises(TrainingError, match=r"layers\.0\..* should have stayed frozen but changed"):
        prove_planned_changes(before, model, names, {name: far(name) for name in before})


@pytest.mark.slow
def test_draws_follow_the_seed_of_training(tmp_path: Path) -> None:
    rates = []
    for seed in (0, 1):
        run = run_of(tmp_path / str(seed), LISA, train={"epochs": 1, "batch_size": 4, "seed": seed})
        train(run)
        log = [json.loads(line) for line in run.log_file.read_text().splitlines()]
        rates.append([{key for key, rate in entry["lr"].items() if rate} for entry in log if "loss" in entry])
    assert rates[0] == [{"0", str(block), "5"} for block in DRAWS]
    assert rates[0] != rates[1]


def test_plan_names_the_draws_and_counts_states_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, LISA)
    plan = PlanTable.read(run.plan_file)
    model = tiny.model(blocks=4, tied=False)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    assert plan.stages[0].trained == total - 3 * block
    counters, positions = 4 * (9 + 3), sum(buffer.nbytes for buffer in model.buffers())
    assert plan.states_bytes == 4 * total + 12 * (total - 3 * block) + counters + positions
    assert plan.stages[0].trains == Drawn(1, 2, frozenset({1, 2, 3, 4}), frozenset({0, 5}))
    (note,) = plan.notes
    assert note.startswith("3 of 4 blocks are drawn at some time in 8 steps; outputs of blocks that may be drawn")
    assert plan.frozen_blocks.boundaries == []
    monkeypatch.setattr(terminal.console, "width", 120)
    assert cli.main(["plan", str(tmp_path / "recipe.yaml")]) == 0
    assert "1 of 4 blocks, drawn anew every 2 steps" in capsys.readouterr().out


def test_draws_stay_among_the_blocks_that_have_an_adapter(tmp_path: Path) -> None:
    run = run_of(tmp_path, {**LISA, "adapter": {**LORA, "layers": [2, 3]}})
    train(run)
    plan = PlanTable.read(run.plan_file)
    assert plan.stages[0].trains.words(4) == "1 of 2 blocks, drawn anew every 2 steps"
    log = [json.loads(line) for line in run.log_file.read_text().splitlines()]
    drawn = [[key for key, rate in entry["lr"].items() if rate] for entry in log if "loss" in entry]
    assert {len(one) for one in drawn} == {1}
    assert {one[0] for one in drawn} == {"2", "3"}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "more blocks than adapters": (
        {"method": {**LISA, "blocks": 2, "adapter": {**LORA, "layers": [2]}}},
        "method.blocks: draws 2 blocks, and the adapter is in 1; try 1",
    ),
    "more blocks than the model": ({"method": {**LISA, "blocks": 5}}, "5 is more than the model's 4 blocks; try 4"),
    "streamed": (
        {"method": {**LISA, "adapter": LORA}, "memory": {"frozen_blocks": "stream"}},
        "stream needs blocks that never train, and here any block may be drawn; try auto",
    ),
    "4 bits": ({"method": LISA, "model": {"base": "base", "quantize": "4bit"}}, "here every one does; add an adapter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_a_draw_cannot_be_combined_with(tmp_path: Path, case: str) -> None:
    sections, message = dict(REFUSED[case][0]), REFUSED[case][1]
    if "model" in sections:
        sections["model"] = {**sections["model"], "base": str(tmp_path / "base")}
    with pytest.raises(RecipeError) as caught:
        run_of(tmp_path, sections.pop("method"), **sections)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
