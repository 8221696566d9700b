"""A recipe as the arguments and data sets of TRL and transformers."""

import math
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from trl import SFTConfig

from llmtune.model.base import computes_bf16
from llmtune.plan.stages import Plan
from llmtune.recipe.sections import Recipe
from llmtune.run import Run
from llmtune.train.plan_table import split_batch

ARGUMENTS = "arguments.json"
OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}


def training_arguments(settings: Recipe, run: Run, plan: Plan, steps: int, world: int, validates: bool) -> SFTConfig:
    """The arguments that TRL and transformers read; the plan decides rates, so theirs are not used."""
    size, passes = split_batch(settings, world)
    every = math.ceil(settings.train.save_every * steps)
    return SFTConfig(
        output_dir=str(run.checkpoints),
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        gradient_accumulation_steps=passes,
        max_steps=steps,
        optim=OPTIMIZERS[settings.train.optimizer],
        weight_decay=settings.train.weight_decay,
        max_grad_norm=settings.train.grad_clip,
        bf16=computes_bf16(settings.model.precision),
        use_cpu=PartialState().device.type == "cpu",
        seed=settings.train.seed,
        gradient_checkpointing=settings.train.activation_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=plan.staged,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=every,
        eval_strategy="steps" if validates else "no",
        eval_steps=every,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=PartialState().device.type == "cuda",
    )


def resolved_arguments(args: SFTConfig) -> dict[str, Any]:
    """Every argument of TRL and transformers with its default, less what names this machine's folders."""
    return {key: value for key, value in sorted(args.to_dict().items()) if not key.endswith(("_dir", "_token"))}


def to_dataset(examples: list[Any], first: int = 0) -> Dataset:
    """Examples for the trainer, numbered from `first` on: input_ids, labels, index."""
    numbered = enumerate(examples, first)
    return Dataset.from_list([{"input_ids": e.input_ids, "labels": e.labels, "index": at} for at, e in numbered])
