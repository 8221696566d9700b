"""A recipe as the arguments and rows of transformers' Trainer."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainingArguments

from llmtune.machine.precision import computing_dtype
from llmtune.recipe.sections import Recipe
from llmtune.run import Run
from llmtune.training.passes.choice import RunPasses
from llmtune.training.plan_table import rows_per_process

ARGUMENTS = "arguments.json"
OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}


def training_arguments(
    recipe: Recipe, run: Run, steps: int, world: int, passes: RunPasses, rows_to_validate: int | None
) -> TrainingArguments:
    """The arguments that transformers reads; the plan decides rates, so theirs are not used.

    One of its batches is all that a process does in a step: passes are not its matter.
    """
    device = PartialState().device
    dtype = computing_dtype(recipe.model.precision, device)
    every = math.ceil(recipe.train.save_every * steps)
    return TrainingArguments(
        output_dir=str(run.checkpoints),
        per_device_train_batch_size=rows_per_process(recipe.train, world),
        per_device_eval_batch_size=rows_to_validate or 1,
        max_steps=steps,
        optim=OPTIMIZERS[recipe.train.optimizer],
        weight_decay=recipe.train.weight_decay,
        max_grad_norm=recipe.train.grad_clip,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        use_cpu=device.type == "cpu",
        seed=recipe.train.seed,
        gradient_checkpointing=passes.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,  # it is wrapped anew where other tensors train
        logging_strategy="no",  # the objective reads a step's numbers at once
        logging_nan_inf_filter=False,
        save_steps=every,
        eval_strategy="steps" if rows_to_validate else "no",
        eval_steps=every,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
    )


def resolved_arguments(args: TrainingArguments, passes: RunPasses) -> dict[str, Any]:
    """Every argument of transformers with its default, less what names this machine's folders, and the passes."""
    theirs = {key: value for key, value in sorted(args.to_dict().items()) if not key.endswith(("_dir", "_token"))}
    return {**theirs, "passes": passes.to_json()}


@contextmanager
def accepted_by_trainer(model: nn.Module) -> Iterator[None]:
    """Hide that frozen weights are quantized: Trainer refuses any quantized model that has no adapter."""
    quantized = vars(model).pop("is_quantized", None)
    try:
        yield
    finally:
        if quantized is not None:
            vars(model)["is_quantized"] = quantized
