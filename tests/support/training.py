"""Planned training on a tiny model, in memory or in a run folder: what the trainer tests share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from llmtune import recipe as recipes
from llmtune.adapters.insert import insert, trained_tensors
from llmtune.data.batches.collate import Collator
from llmtune.data.batches.passes import PassLimits
from llmtune.frozen.cache import FrozenBlocks
from llmtune.methods.kinds import Method
from llmtune.model.base import Base, model_facts
from llmtune.plan.schedule import Over, Schedule, Shape
from llmtune.run import Run
from llmtune.run_log import Record
from llmtune.training.objective import SupervisedTrainer
from llmtune.training.prepare import prepare
from tests.support import tiny

BASE = Base(Path("nowhere"), "tiny", None, None)
LORA = {"kind": "lora", "rank": 4, "alpha": 8}
GRADUAL = {"kind": "gradual", "reaches": [1, 2, "all"], "lr": 0.01}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full", "lr": 0.01},
    "frozen": {"kind": "frozen", "reach": 2, "lr": 0.01},
    "gradual": GRADUAL,
    "narrowing": {"kind": "staged", "stages": [{"until": 0.34, "lr": 0.01}, {"until": 1.0, "reach": 1, "lr": 0.01}]},
}
Snapshot = dict[str, torch.Tensor]


def snapshot(model: nn.Module) -> Snapshot:
    """A copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@dataclass
class Watch(TrainerCallback):
    """Keeps a copy of every parameter before each step, and of every gradient in it."""

    before: list[Snapshot] = field(default_factory=list)
    gradients: list[Snapshot] = field(default_factory=list)

    def on_step_begin(self, *_: object, model: nn.Module, **named: object) -> None:
        self.before.append(snapshot(model))

    def on_pre_optimizer_step(self, *_: object, model: nn.Module, **named: object) -> None:
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        self.gradients.append({name: grad.clone() for name, grad in gradients.items() if grad is not None})


@dataclass
class Rates(TrainerCallback):
    """Keeps the rate of every distance at each step, as the optimizer has it."""

    used: list[dict[int, float]] = field(default_factory=list)

    def on_pre_optimizer_step(self, *_: object, optimizer: torch.optim.Optimizer, **named: object) -> None:
        self.used.append({group["distance"]: group["lr"] for group in optimizer.param_groups})


@dataclass
class _Recipe:
    """As much of a recipe as choosing a plan and inserting an adapter need."""

    method: Method


def spec(method: dict[str, Any]) -> _Recipe:
    """As much of a recipe as choosing a plan and inserting an adapter need."""
    return _Recipe(TypeAdapter(Method).validate_python(method))


def rows(count: int = 24, seed: int = 1) -> list[dict[str, Any]]:
    """Rows of different lengths with a prompt that is not supervised."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for index in range(count):
        ids = torch.randint(3, 200, (6 + index % 7,), generator=generator).tolist()
        result.append({"input_ids": ids, "labels": [-100] * (2 + index % 3) + ids[2 + index % 3 :]})
    return result


def trainer(
    out: Path,
    method: dict[str, Any],
    *,
    model: PreTrainedModel | None = None,
    data: list[dict[str, Any]] | None = None,
    steps: int = 6,
    shape: Shape = "constant",
    warmup: float = 0.0,
    over: Over = "run",
    callbacks: Sequence[TrainerCallback] = (),
    record: Callable[[Record], None] = lambda entry: None,
    keep: int = 99,
    eval_data: list[dict[str, Any]] | None = None,
    kind: type[SupervisedTrainer] = SupervisedTrainer,
    frozen_blocks: FrozenBlocks | None = None,
    grouped: bool = False,
    limits: PassLimits | None = None,
    copies: bool = False,
    **arguments: Any,
) -> SupervisedTrainer:
    """A trainer for a method on a tiny model (4 blocks by default), ready to train; `arguments` are transformers'."""
    model = tiny.model(blocks=4, tied=False) if model is None else model
    recipe = spec(method)
    plan = recipe.method.plan(model_facts(model))
    torch.manual_seed(0)
    adapted = insert(model, recipe.method.adapter, plan, BASE)
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": steps,
        "bf16": False,
        "use_cpu": True,
        "seed": 0,
        "gradient_checkpointing": False,
        "ddp_find_unused_parameters": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "max_grad_norm": 1e9,
    }
    result = kind(
        adapted,
        make_schedule=lambda count: Schedule(plan, count, warmup, shape, over=over),
        tensors=trained_tensors(adapted, plan),
        record=record,
        keep=keep,
        frozen_blocks=frozen_blocks,
        grouped=grouped,
        limits=limits,
        copies=copies,
        args=TrainingArguments(output_dir=str(out), **{**defaults, **arguments}),
        train_dataset=data or rows(),
        eval_dataset=eval_data,
        data_collator=Collator(0),
        processing_class=tiny.tokenizer(),
        callbacks=list(callbacks),
    )
    result.remove_callback(PrinterCallback)
    return result


def fit(folder: Path, method: dict[str, Any], **more: Any) -> tuple[SupervisedTrainer, list[Snapshot], list[Record]]:
    """The trainer after training, the parameters before each step and at the end, and the log."""
    watch, log = Watch(), list[Record]()
    result = trainer(folder, method, callbacks=[watch], record=log.append, **more)
    result.train()
    return result, [*watch.before, snapshot(result.model)], log


def validation_loss(folder: Path, count: int) -> float:
    """The loss over that many validation rows, before any training."""
    return trainer(folder, METHODS["full"]).evaluate(rows(count, seed=5))["eval_loss"]


def prepare_run(folder: Path, method: dict[str, Any], count: int = 40, name: str = "run", **sections: Any) -> Run:
    """A prepared run of `count` rows on a tiny base of three blocks; the base is made once in a folder."""
    base = folder / "base"
    if not base.exists():
        tiny.save_base(base, blocks=3)
    data = tiny.write_rows(folder / "train.jsonl", tiny.sums(count))
    file = tiny.write_recipe(folder / f"{name}.yaml", base, data, method, **sections)
    return prepare(recipes.load(file), folder / name, gpus=0)
