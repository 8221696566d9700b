"""A recipe as the arguments and rows of transformers' Trainer."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import TrainingArguments

from llmtune.data.encode import Example
from llmtune.model.base import computes_bf16
from llmtune.recipe.sections import Recipe
from llmtune.run import Run
from llmtune.training.plan_table import split_batch

ARGUMENTS = "arguments.json"
OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}


def training_arguments(recipe: Recipe, run: Run, steps: int, world: int, validates: bool) -> TrainingArguments:
    """The arguments that transformers reads; the plan decides rates, so theirs are not used."""
    size, passes = split_batch(recipe.train, world)
    every = math.ceil(recipe.train.save_every * steps)
    return TrainingArguments(
        output_dir=str(run.checkpoints),
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        gradient_accumulation_steps=passes,
        max_steps=steps,
        optim=OPTIMIZERS[recipe.train.optimizer],
        weight_decay=recipe.train.weight_decay,
        max_grad_norm=recipe.train.grad_clip,
        bf16=computes_bf16(recipe.model.precision),
        use_cpu=PartialState().device.type == "cpu",
        seed=recipe.train.seed,
        gradient_checkpointing=recipe.train.activation_checkpointing is True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,  # it is wrapped anew where other tensors train
        logging_strategy="no",  # the objective reads a step's numbers at once
        logging_nan_inf_filter=False,
        save_steps=every,
        eval_strategy="steps" if validates else "no",
        eval_steps=every,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=PartialState().device.type == "cuda",
    )


def resolved_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Every argument of transformers with its default, less what names this machine's folders."""
    return {key: value for key, value in sorted(args.to_dict().items()) if not key.endswith(("_dir", "_token"))}


def to_rows(examples: list[Example], first: int = 0) -> list[dict[str, Any]]:
    """Examples as the trainer's rows, numbered from `first` on: input_ids, labels, index."""
    numbered = enumerate(examples, first)
    return [{"input_ids": e.input_ids, "labels": e.labels, "index": index} for index, e in numbered]


@contextmanager
def accepted_by_trainer(model: nn.Module) -> Iterator[None]:
    """Hide that frozen weights are quantized: Trainer refuses any quantized model that has no adapter."""
    quantized = vars(model).pop("is_quantized", None)
    try:
        yield
    finally:
        if quantized is not None:
            vars(model)["is_quantized"] = quantized
