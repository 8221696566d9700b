"""What trains, at which rate, and what stays, step by step, on tiny models in fp32."""

import math
import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from llmtune.errors import TrainingError
from llmtune.model.blocks import distances
from llmtune.plan.schedule import Shape
from llmtune.run_log import Record
from llmtune.training.objective import SupervisedTrainer
from llmtune.training.stages.groups import optimizer_groups
from tests.support import tiny, training
from tests.support.training import GRADUAL, LORA, METHODS, fit

DISTANCES = {"full": [5] * 6, "frozen": [2] * 6, "gradual": [1, 1, 2, 2, 5, 5], "narrowing": [5, 5, 1, 1, 1, 1]}
"""The farthest distance that trains at each of six steps, for each of METHODS."""


def far(name: str) -> int:
    """The distance of a parameter of the model of four blocks."""
    inside = re.search(r"layers\.(\d+)\.", name)
    return 4 - int(inside.group(1)) if inside else 5 if "embed_tokens" in name else 0


@pytest.mark.parametrize(
    "adapter", ["none", LORA, pytest.param({"kind": "ia3"}, marks=pytest.mark.slow)], ids=["none", "lora", "ia3"]
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("method", METHODS)
def test_changes_exactly_the_planned_tensors_at_every_step(
    tmp_path: Path, method: str, checkpointing: bool, adapter: Any
) -> None:
    trainer, snapshots, _ = fit(
        tmp_path,
        {**METHODS[method], "adapter": adapter},
        gradient_checkpointing=checkpointing,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        weight_decay=0.1,
    )
    adapted = isinstance(trainer.model, PeftModel)
    for step, reach in enumerate(DISTANCES[method]):
        planned = {name for name in snapshots[0] if far(name) <= reach}
        if adapted:
            planned = {name for name in planned if "lora" in name or "ia3" in name}
        changed = {name for name in snapshots[0] if not torch.equal(snapshots[step][name], snapshots[step + 1][name])}
        assert changed == planned, f"step {step + 1}"


FALLS: dict[Shape, Callable[[float], float]] = {
    "constant": lambda past: 1.0,
    "linear": lambda past: 1 - past,
    "cosine": lambda past: 0.5 * (1 + math.cos(math.pi * past)),
}


@pytest.mark.parametrize("method", [GRADUAL, {**GRADUAL, "bottom_ratio": 0.1}, {**GRADUAL, "adapter": LORA}])
@pytest.mark.parametrize("shape", FALLS)
def test_logs_the_planned_rate_that_every_group_used(tmp_path: Path, method: dict[str, Any], shape: Shape) -> None:
    rates, log = training.Rates(), list[Record]()
    training.trainer(tmp_path, method, steps=9, shape=shape, warmup=2 / 9, callbacks=[rates], record=log.append).train()
    reach, since, ratio = (1, 2, 5), (0, 0, 3, 6, 6, 6), method.get("bottom_ratio", 1.0)
    for step, (used, entry) in enumerate(zip(rates.used, log, strict=True)):
        fall = FALLS[shape](max(0, step - 2) / 7)
        expected = {
            far: 0.01 * ratio ** (far / 3) * min(1, (step - since[far] + 1) / 2) * fall * (far <= reach[step // 3])
            for far in used
        }
        assert used == pytest.approx(expected, abs=1e-12)
        assert entry["lr"] == {str(distance): rate for distance, rate in used.items()}
    assert set(rates.used[0]) == ({1, 2, 3, 4} if "adapter" in method else {0, 1, 2, 3, 4, 5})
    assert len(rates.used) == 9


@pytest.mark.parametrize("adapter", ["none", LORA], ids=["none", "lora"])
def test_moves_weights_in_proportion_to_their_rate(tmp_path: Path, adapter: Any) -> None:
    method = {"kind": "discriminative", "decay": 0.5, "lr": 0.1, "adapter": adapter}
    model = tiny.model(blocks=4, tied=False)
    watch = training.Watch()
    trainer = training.trainer(tmp_path, method, model=model, steps=1, callbacks=[watch], optim="sgd")
    trainer.train()
    end = dict(trainer.model.named_parameters())
    kinds = defaultdict[int, set[str]](set)
    for name, gradient in watch.gradients[0].items():
        rate = 0.1 * 0.5 ** trainer.distance[name]
        torch.testing.assert_close(end[name] - watch.before[0][name], -rate * gradient, rtol=1e-4, atol=1e-6)
        kinds[trainer.distance[name]].add(name)
    assert set(kinds) == ({0, 1, 2, 3, 4, 5} if adapter == "none" else {1, 2, 3, 4})


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("method", ["frozen", "gradual", "lora-top"])
def test_stops_backward_at_the_farthest_distance_that_trains(tmp_path: Path, method: str, checkpointing: bool) -> None:
    spec = {**METHODS["frozen"], "adapter": LORA} if method == "lora-top" else METHODS[method]
    reaches = DISTANCES["frozen" if method == "lora-top" else method]
    model = tiny.model(blocks=4, tied=False)
    reached: list[set[int]] = []

    class NewStep(TrainerCallback):
        def on_step_begin(self, *_: object, **named: object) -> None:
            reached.append(set())

    def add_distance(distance: int, gradient: torch.Tensor) -> None:
        reached[-1].add(distance)

    blocks = list(model.model.layers)

    def watch(distance: int) -> Callable[[nn.Module, object, torch.Tensor | tuple[torch.Tensor, ...]], None]:
        def forward(module: nn.Module, arguments: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if tensor.requires_grad:
                tensor.register_hook(partial(add_distance, distance))  # type: ignore[no-untyped-call]

        return forward

    trainer = training.trainer(tmp_path, spec, model=model, callbacks=[NewStep()], gradient_checkpointing=checkpointing)
    for index, block in enumerate(blocks):
        block.register_forward_hook(watch(4 - index))
    trainer.train()
    for step, reach in enumerate(reaches):
        assert reached[step] == set(range(1, min(reach, 4) + 1)), f"step {step + 1}"


def test_partitions_what_trains_into_groups() -> None:
    model = tiny.model(blocks=3)
    tensors, distance = dict(model.named_parameters()), distances(model)
    groups = optimizer_groups(tensors, distance, 0.1)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in tensors.values())
    assert {(group["distance"], group["weight_decay"]) for group in groups} == {
        (0, 0.0), (1, 0.0), (1, 0.1), (2, 0.0), (2, 0.1), (3, 0.0), (3, 0.1), (4, 0.1),
    }  # fmt: skip


def test_rates_match_the_closed_form_over_three_stages(tmp_path: Path) -> None:
    rates, log = training.Rates(), list[Record]()
    lr, reach, first = (0.01, 0.02, 0.005), (1, 2, 5), (0, 0, 3, 6, 6, 6)
    method = {"kind": "gradual", "reaches": [1, 2, "all"], "lr": list(lr), "bottom_ratio": 0.1}
    training.trainer(
        tmp_path, method, steps=9, shape="cosine", warmup=2 / 9, callbacks=[rates], record=log.append
    ).train()
    assert len(rates.used) == 9
    for step, used in enumerate(rates.used):
        fall = 0.5 * (1 + math.cos(math.pi * max(0, step - 2) / 7))
        expected = {
            far: lr[step // 3] * 0.1 ** (far / 3) * min(1, (step - first[far] + 1) / 2) * fall
            if far <= reach[step // 3]
            else 0.0
            for far in range(6)
        }
        assert used == pytest.approx(expected, abs=1e-12)
        assert log[step]["lr"] == {str(far): rate for far, rate in used.items()}


class NearOnly(SupervisedTrainer):
    """A trainer whose optimizer lacks the tensors at distance 2 and farther."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """An optimizer of the near tensors."""
        near = {name: tensor for name, tensor in self.current_tensors().items() if self.distance[name] < 2}
        self.optimizer = torch.optim.AdamW(optimizer_groups(near, self.distance, 0.0), lr=1.0)
        return self.optimizer


def test_fails_when_a_planned_tensor_is_in_no_group(tmp_path: Path) -> None:
    method = {"kind": "gradual", "reaches": [1, "all"], "lr": 0.01}
    with pytest.raises(TrainingError, match=r"embed_tokens\.weight should train but is not in the optimizer"):
        training.trainer(tmp_path, method, kind=NearOnly).train()


@pytest.mark.parametrize("adapter", ["none", {"kind": "lora", "rank": 4}], ids=["none", "lora"])
def test_trains_in_fp32_where_the_model_is_bf16(tmp_path: Path, adapter: Any) -> None:
    watch = training.Watch()
    method = {"kind": "frozen", "reach": 2, "lr": 1e-5, "adapter": adapter}
    model = tiny.model(blocks=4, tied=False).bfloat16()
    trainer = training.trainer(tmp_path, method, model=model, callbacks=[watch], bf16=True)
    trainer.train()
    trained = trainer.current_tensors()
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trained else torch.bfloat16), name
    assert {tensor.dtype for tensor in trainer.trained_state().values()} == {torch.float32}
    for name, tensor in trained.items():
        changed = (tensor.detach() != watch.before[0][name]).float().mean()
        assert changed > 0.5 or "lora_A" in name or "lm_head" in name, f"{name}: {changed:.0%}"
    if adapter == "none":
        norm = trained["model.norm.weight"].detach() - watch.before[0]["model.norm.weight"]
        assert (norm != 0).all()
