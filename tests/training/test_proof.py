"""What training proves of itself: what should change changed, and what should not did not."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from llmtune.errors import TrainingError
from llmtune.model.blocks import distances
from llmtune.run_log import Record
from llmtune.training.loop import train
from llmtune.training.proof import check_validation, checksums
from tests.support import training
from tests.support.training import METHODS, prepare_run


class Restore(TrainerCallback):
    """Undoes every step for some tensors, chosen by name and distance, as where an optimizer has stale copies."""

    def __init__(self, chooses: Callable[[str, int], bool]) -> None:
        self.chooses = chooses
        self.before: dict[str, torch.Tensor] = {}

    def on_train_begin(self, *_: object, model: nn.Module, **named: object) -> None:
        distance = distances(model)
        self.before = {n: p.detach().clone() for n, p in model.named_parameters() if self.chooses(n, distance[n])}

    def on_step_end(self, *_: object, model: nn.Module, **named: object) -> None:
        with torch.no_grad():
            for name, tensor in self.before.items():
                model.get_parameter(name).copy_(tensor)


def test_fails_when_nothing_changed_at_some_distance(tmp_path: Path) -> None:
    run = prepare_run(tmp_path, METHODS["full"])
    with pytest.raises(TrainingError, match="nothing at distance 2 changed, so it was not trained"):
        train(run, callbacks=[Restore(lambda name, distance: distance == 2)])
    assert not run.done("train")


def test_warns_of_single_tensors_that_never_changed(tmp_path: Path) -> None:
    lost = {f"model.layers.{index}.mlp.up_proj.weight" for index in (0, 1)}
    run = prepare_run(tmp_path, METHODS["full"])
    train(run, callbacks=[Restore(lambda name, distance: name in lost)])
    entries = map(json.loads, run.log_file.read_text().splitlines())
    warnings = [entry["warning"] for entry in entries if "warning" in entry]
    assert warnings == [f"warning: never changed, though to be trained: {min(lost)} and 1 more"]


@pytest.mark.parametrize(("steps", "warns"), [(1, False), (2, False), (3, True)])
@pytest.mark.slow
def test_judges_a_tensor_by_enough_steps(tmp_path: Path, steps: int, warns: bool) -> None:
    method = {"kind": "full", "lr": 0.01, "adapter": {"kind": "lora", "rank": 4}}
    run = prepare_run(tmp_path, method, train={"epochs": 1, "batch_size": 4, "max_steps": steps})
    train(run, callbacks=[Restore(lambda name, distance: "up_proj.lora_A" in name)])
    warnings = [line for line in run.log_file.read_text().splitlines() if "never changed" in line]
    assert bool(warnings) == warns
    assert run.done("train")


class Spoil(TrainerCallback):
    """Makes one trained number infinite after the last step."""

    def on_train_end(self, *_: object, model: nn.Module, **named: object) -> None:
        with torch.no_grad():
            model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = torch.inf


def test_fails_when_a_trained_weight_is_not_finite(tmp_path: Path) -> None:
    run = prepare_run(tmp_path, METHODS["full"])
    with pytest.raises(TrainingError, match=r"layers\.0\.mlp\.up_proj\.weight holds numbers that are not finite"):
        train(run, callbacks=[Spoil()])
    assert not run.done("train")


def test_fails_on_a_last_validation_loss_that_is_not_finite_and_warns_of_others() -> None:
    log: list[Record] = []
    check_validation(1.5, 4, 4, log.append)
    assert log == []
    check_validation(math.nan, 2, 4, log.append)
    warning = "warning: the validation loss is nan at step 2. A lower method.lr is the usual remedy"
    assert log == [{"step": 2, "warning": warning}]
    with pytest.raises(TrainingError, match="the validation loss is inf at step 4, the last one"):
        check_validation(math.inf, 4, 4, log.append)


@pytest.mark.parametrize(
    ("precision", "adapter"),
    [(torch.float32, "none"), (torch.float32, {"kind": "lora", "rank": 4}), (torch.bfloat16, "none")],
    ids=["fp32", "fp32-lora", "bf16"],
)
def test_warns_of_a_step_that_changes_few_weights(tmp_path: Path, precision: torch.dtype, adapter: Any) -> None:
    log: list[Record] = []
    method = {"kind": "full", "lr": 1e-5, "adapter": adapter}
    trainer = training.trainer(tmp_path, method, record=log.append)
    trainer.model.to(precision)  # as where the fp32 copy of what trains is lost
    trainer.train()
    changed = [entry["changed"] for entry in log if "changed" in entry]
    warnings = [entry for entry in log if "warning" in entry]
    assert [entry["step"] for entry in log if "changed" in entry] == [3]
    if precision == torch.float32:
        assert changed[0] > 0.99
        assert not warnings
    else:
        assert changed[0] < 0.5
        assert warnings[0]["step"] == 3
        assert warnings[0]["warning"].startswith(f"warning: the step changed {changed[0]:.0%} of the elements")


def test_checksums_see_one_changed_element() -> None:
    tensor = torch.randn(33, 7)
    before = checksums({"a": tensor, "b": tensor.bfloat16()})
    assert before == checksums({"a": tensor.clone(), "b": tensor.bfloat16()})
    tensor[3, 3] += 1e-6
    assert before["a"] != checksums({"a": tensor})["a"]
