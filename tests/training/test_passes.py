"""A step in passes: equal to one pass, within its limits, the same after a resume whatever is free by then."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import nn
from transformers import LlamaForCausalLM

from llmtune import recipe
from llmtune.data.batches.passes import PassLimits
from llmtune.data.example import Example
from llmtune.errors import FieldError, LlmtuneError
from llmtune.estimate.passes import PassSize
from llmtune.files import write_json
from llmtune.kernels.cpu.copies import WeightCopies
from llmtune.run import Run
from llmtune.run_log import read_log
from llmtune.training import loop
from llmtune.training.arguments import ARGUMENTS
from llmtune.training.checkpoint import OBJECTIVE, complete_checkpoints
from llmtune.training.loop import train
from llmtune.training.passes import choice
from llmtune.training.passes.choice import RunPasses
from llmtune.training.passes.trainer import SplitSteps
from llmtune.training.prepare import Prepared, prepare_all
from tests.support import cached, tiny, training
from tests.support.training import LORA, METHODS, prepare_run

WIDTHS = {1: PassLimits(), 2: PassLimits(4), 5: PassLimits(tokens=23)}
"""Limits by the number of passes of the first step's eight rows, the longest of which has twelve tokens."""
Choose = Callable[[dict[str, Any]], RunPasses]
CASES: dict[str, dict[str, Any]] = {
    "full": METHODS["full"],
    "lora": {**METHODS["full"], "adapter": LORA},
    "cached": {"kind": "frozen", "reach": 2, "lr": 0.01},
}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("case", CASES)
def test_passes_add_up_to_one(tmp_path: Path, case: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = _count_passes(monkeypatch)
    options: dict[str, Any] = {"steps": 2, "per_device_train_batch_size": 8, "gradient_checkpointing": checkpointing}
    fits = {}
    for passes, limits in WIDTHS.items():
        fits[passes] = cached.fit(tmp_path, CASES[case], keep=case == "cached", limits=limits, **options)
        assert counts[:1] == [passes]
        counts.clear()
    assert ("cached" in fits[1][0]) == (case == "cached")
    cached.assert_equal(fits[2], fits[1])
    cached.assert_equal(fits[5], fits[1])
    tokens = [[(entry["tokens"], entry["supervised"]) for entry in fit[1] if "loss" in entry] for fit in fits.values()]
    assert tokens[0] == tokens[1] == tokens[2]


def _count_passes(monkeypatch: pytest.MonkeyPatch, seen: Callable[[Any], None] = lambda rows: None) -> list[int]:
    """The number of passes of each step that is trained from now on, and `seen` called with each one's rows."""
    counts: list[int] = []
    step, one_pass = SplitSteps.training_step, SplitSteps._pass

    def counted_step(self: SplitSteps, *arguments: Any) -> torch.Tensor:
        counts.append(0)
        return step(self, *arguments)

    def counted_pass(self: SplitSteps, model: nn.Module, rows: Any, count: Any) -> torch.Tensor:
        counts[-1] += 1
        seen(rows)
        return one_pass(self, model, rows, count)

    monkeypatch.setattr(SplitSteps, "training_step", counted_step)
    monkeypatch.setattr(SplitSteps, "_pass", counted_pass)
    return counts


def test_no_pass_of_a_training_holds_more_than_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []
    counts = _count_passes(monkeypatch, lambda rows: shapes.append(rows["input_ids"].shape))
    options: dict[str, Any] = {"steps": 9, "per_device_train_batch_size": 8}
    training.fit(tmp_path, METHODS["full"], data=training.rows(19), limits=PassLimits(3, 25), **options)
    assert sum(rows for rows, _ in shapes) == 3 * 19
    assert all(rows <= 3 and (rows == 1 or rows * width <= 25) for rows, width in shapes)
    assert max(counts) > 3


def test_a_step_sets_training_mode_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    trainer = training.trainer(tmp_path, METHODS["full"], limits=PassLimits(1), steps=2)
    monkeypatch.setattr(trainer.model, "train", lambda mode=True: modes.append(mode))
    trainer.model.eval()
    trainer.train()
    assert modes.count(True) == 2, "two steps of four passes"


def test_a_step_clears_gradients_of_what_trains_without_a_walk_over_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: list[int] = []
    trainer = training.trainer(tmp_path, METHODS["frozen"], steps=3)
    monkeypatch.setattr(type(trainer.model), "zero_grad", lambda model: walks.append(trainer.state.global_step))
    trainer.train()
    assert walks == [0], "before the first step alone"
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert "zero_grad" not in vars(trainer.model)


def test_loader_leaves_random_numbers_alone_and_no_thread(tmp_path: Path) -> None:
    trainer = training.trainer(tmp_path, METHODS["full"])
    batches = iter(trainer.get_train_dataloader())
    next(batches)
    before, threads = torch.get_rng_state(), threading.active_count()
    assert len(list(batches)) == 5
    assert torch.equal(torch.get_rng_state(), before)
    assert threading.active_count() == threads


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("passes")
    base = tiny.save_base(folder / "base", blocks=3)
    rows = tiny.write_rows(folder / "train.jsonl", tiny.sums(40))
    file = tiny.write_recipe(folder / "recipe.yaml", base, rows, METHODS["full"])
    return prepare_all(recipe.load(file), folder / "run", gpus=0)


@pytest.fixture
def chosen(prepared: Prepared) -> Choose:
    """The passes that are chosen for a recipe with these settings of its training."""

    def choose(settings: dict[str, Any]) -> RunPasses:
        settled = prepared.run.recipe()
        train = settled.train.model_copy(update={"batch_size": 4, **settings})
        return choice.choose_passes(
            settled.model_copy(update={"train": train}), prepared.layout, PartialState(), 30, None
        )

    return choose


def _offer(monkeypatch: pytest.MonkeyPatch, tokens: int, checkpointing: bool = False, copies: bool = True) -> None:
    size = PassSize(tokens, checkpointing, f"passes of up to {tokens} tokens", copies)
    monkeypatch.setattr(choice, "choose_pass_size", lambda *_: size)


def _trained(run: Run) -> bytes:
    return next(run.delta.glob("*.safetensors")).read_bytes()


@pytest.mark.slow
def test_resume_inside_an_epoch_keeps_the_passes_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = _count_passes(monkeypatch)
    settings = {"batch_size": 8, "max_steps": 7, "save_every": 0.4, "keep": 9, "optimizer": "sgd"}
    run = prepare_run(tmp_path, METHODS["full"], train=settings)
    _offer(monkeypatch, 60, checkpointing=True)
    train(run)
    whole, log = _trained(run), read_log(run.log_file)
    assert {"step": 0, "passes": "passes of up to 60 tokens"} in log
    recorded = {"rows": 8, "tokens": 60, "checkpointing": True}
    arguments = json.loads((run.path / ARGUMENTS).read_text())
    assert (arguments["passes"], arguments["gradient_accumulation_steps"]) == (recorded, 1)
    assert arguments["per_device_eval_batch_size"] <= 60 // 8
    assert complete_checkpoints(run.checkpoints)[0].name == "step-000003", "inside an epoch of four steps"
    for late in complete_checkpoints(run.checkpoints)[1:]:
        shutil.rmtree(late)
    shutil.rmtree(run.delta)
    passes = counts[3:]
    counts.clear()
    _offer(monkeypatch, 9_999)
    train(run)
    assert counts == passes
    assert _trained(run) == whole
    assert [entry for entry in read_log(run.log_file) if "passes" in entry] == [
        entry for entry in log if "passes" in entry
    ]
    assert json.loads((run.path / ARGUMENTS).read_text())["passes"] == recorded


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"micro_batch_tokens": 50}, PassLimits(4, 50)),
        ({"micro_batch_size": 2}, PassLimits(2, None)),
        ({"micro_batch_size": 2, "micro_batch_tokens": 50}, PassLimits(2, 50)),
        ({}, PassLimits(4, 5)),
    ],
    ids=str,
)
def test_settings_of_a_recipe_stand_whatever_is_free(
    chosen: Choose, settings: dict[str, Any], expected: PassLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    _offer(monkeypatch, 5)
    assert chosen(settings).limits == expected


def test_resumed_run_keeps_copies_of_weights_where_they_fit_now(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / OBJECTIVE, {"passes": {"rows": 4, "tokens": 60, "checkpointing": True}})
    for free, kept in ((10**10, True), (10**5, False)):
        monkeypatch.setattr(choice, "free_bytes", lambda _, free=free: free)
        passes = choice.choose_passes(prepared.run.recipe(), prepared.layout, PartialState(), 30, tmp_path)
        assert (passes.limits, passes.checkpointing, passes.copies) == (PassLimits(4, 60), True, kept)


def test_lengths_of_rows_are_read_once_before_the_base_loads(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []

    class Rows(list[Example]):
        def __iter__(self) -> Iterator[Example]:
            reads.append("rows")
            return super().__iter__()

    def load(*_: object) -> None:
        raise LlmtuneError("the base loads")

    monkeypatch.setattr(loop, "_load", load)
    data = replace(prepared.data, train=Rows(prepared.data.train))
    with pytest.raises(LlmtuneError, match="the base loads"):
        train(prepared.run, replace(prepared, data=data))
    assert len(reads) == 2, "their lengths, and the tokens that are learned"


@pytest.mark.slow
def test_training_without_room_for_copies_of_weights_keeps_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, predicted, begun, begin_step = [], [], list[WeightCopies](), WeightCopies.begin_step

    def noted(self: WeightCopies) -> None:
        begun.append(self)
        begin_step(self)

    monkeypatch.setattr(WeightCopies, "begin_step", noted)
    for copies in (True, False):
        _offer(monkeypatch, 500, copies=copies)
        model = {"base": str(tmp_path / "base"), "precision": "bf16"}
        settings = {"batch_size": 8, "max_steps": 2}
        run = prepare_run(tmp_path, METHODS["full"], name=f"copies-{copies}", model=model, train=settings)
        train(run)
        assert len(begun) == 2, "the steps of the run with copies alone"
        trained.append(_trained(run))
        predicted += [entry["predicted"] for entry in read_log(run.log_file) if "predicted" in entry]
    assert trained[0] == trained[1]
    assert predicted[0] > predicted[1]


def test_refuses_checkpointing_that_a_model_cannot_do(chosen: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(FieldError, match="this model's code does not support it; try auto"):
        chosen({"activation_checkpointing": True})
    _offer(monkeypatch, 500, checkpointing=True)
    assert not chosen({}).checkpointing
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", True)
    assert chosen({}).checkpointing
