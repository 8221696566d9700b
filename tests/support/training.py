"""A planned training run on a tiny model, in memory: what the trainer tests share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from llmtune.adapters.insert import insert, trained_tensors
from llmtune.data.collate import Collator
from llmtune.methods.kinds import Method
from llmtune.model.base import Base, model_facts
from llmtune.plan.schedule import Schedule
from llmtune.train.objective import SupervisedTrainer
from tests.support import tiny

BASE = Base(Path("nowhere"), "tiny", None, None)


@dataclass
class Watch(TrainerCallback):
    """Keeps a copy of every parameter before and after each step, and which required a gradient."""

    before: list[dict[str, torch.Tensor]] = field(default_factory=list)
    live: list[set[str]] = field(default_factory=list)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **named: Any) -> None:
        self.before.append({name: p.detach().clone() for name, p in model.named_parameters()})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **named: Any) -> None:
        self.live.append({name for name, p in model.named_parameters() if p.grad is not None})


@dataclass
class Rates(TrainerCallback):
    """Keeps the rate of every distance at each step, as the optimizer has it."""

    used: list[dict[int, float]]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **named: Any) -> None:
        self.used.append({group["distance"]: group["lr"] for group in optimizer.param_groups})


@dataclass
class _Recipe:
    """As much of a recipe as choosing a plan and inserting an adapter need."""

    method: Method


def spec(method: dict[str, Any]) -> Any:
    """As much of a recipe as choosing a plan and inserting an adapter need."""
    return _Recipe(TypeAdapter(Method).validate_python(method))


def rows(count: int = 24, seed: int = 1) -> list[dict[str, list[int]]]:
    """Rows of different lengths with a prompt that is not supervised."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        ids = torch.randint(3, 200, (6 + index % 7,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (2 + index % 3) + ids[2 + index % 3 :]})
    return made


def trainer(
    out: Path,
    method: dict[str, Any],
    *,
    model: Any = None,
    data: list[dict[str, list[int]]] | None = None,
    steps: int = 6,
    shape: str = "constant",
    warmup: float = 0.0,
    callbacks: list[Any] | None = None,
    record: Any = None,
    keep: int = 99,
    eval_data: list[dict[str, list[int]]] | None = None,
    frozen_blocks: Any = None,
    grouped: bool = False,
    **arguments: Any,
) -> SupervisedTrainer:
    """A trainer for a method on a tiny model (4 blocks unless given), ready to train."""
    model = tiny.model(blocks=4, tied=False) if model is None else model
    recipe = spec(method)
    plan = recipe.method.plan(model_facts(model))
    torch.manual_seed(0)
    adapted = insert(model, recipe.method.adapter, plan, BASE)  # type: ignore[arg-type]
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": steps,
        "bf16": False,
        "use_cpu": True,
        "seed": 0,
        "gradient_checkpointing": False,
        "ddp_find_unused_parameters": plan.staged,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "max_grad_norm": 1e9,
    }
    made = SupervisedTrainer(
        adapted,
        make_schedule=lambda count: Schedule(plan, count, warmup, shape),  # type: ignore[arg-type]
        tensors=trained_tensors(adapted, plan),
        record=record or (lambda entry: None),
        keep=keep,
        frozen_blocks=frozen_blocks,
        grouped=grouped,
        args=TrainingArguments(output_dir=str(out), **{**defaults, **arguments}),
        train_dataset=data or rows(),
        eval_dataset=eval_data,
        data_collator=Collator(0),
        processing_class=tiny.tokenizer(),
        callbacks=callbacks or [],
    )
    made.remove_callback(PrinterCallback)
    return made
