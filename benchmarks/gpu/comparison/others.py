"""The other tools: TRL as documented and at its best, transformers' Trainer with PEFT and Liger, and Unsloth."""

import importlib.util
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from benchmarks.arms import Arm
from benchmarks.gpu.child import Job
from benchmarks.gpu.comparison import contest
from benchmarks.gpu.runs.clock import Clock
from benchmarks.gpu.runs.models import tokenizer
from benchmarks.gpu.runs.rows import MAX_LENGTH
from benchmarks.tools.models import load_for
from llmtune.data.batches.collate import Collator


def there(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def train_other(job: Job, tool: str, arm: Arm, rows: list[dict[str, Any]], clock: Clock) -> tuple[list[float], str]:
    """Train rows in their order; losses of the steps, and how the tool was set. Out of memory, it checkpoints."""
    if tool in ("trl", "unsloth"):
        return _train(job, tool, arm, rows, clock, checkpointing=tool == "trl")
    try:
        return _train(job, tool, arm, rows, clock, checkpointing=False)
    except torch.OutOfMemoryError:
        pass
    job.clean()
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock.restart()
    losses, note = _train(job, tool, arm, rows, clock, checkpointing=True)
    return losses, f"{note}, checkpointing since memory was too small"


def _train(
    job: Job, tool: str, arm: Arm, rows: list[dict[str, Any]], clock: Clock, checkpointing: bool
) -> tuple[list[float], str]:
    from datasets import Dataset

    torch.manual_seed(0)
    size = job.arguments["rows_a_pass"]
    passes = contest.BATCH[job.device] // size
    fits_liger, fits_flash = there("liger_kernel") and job.device == "cuda", there("flash_attn")
    arguments = {
        "output_dir": str(job.folder / "others"),
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": passes,
        "max_steps": contest.STEPS,
        "learning_rate": arm.method["lr"],
        "lr_scheduler_type": "constant",
        "bf16": True,
        "use_cpu": job.device == "cpu",
        "seed": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": checkpointing,
        "max_grad_norm": 1.0,
    }
    more: dict[str, Any] = {"train_dataset": Dataset.from_list(rows), "callbacks": [clock]}
    padding_free = tool == "trl-best" and fits_flash and job.device == "cuda"
    if not padding_free:
        more["data_collator"] = Collator(0)
    if tool in ("trl-best", "peft"):
        arguments |= {"optim": "adamw_torch_fused", "logging_nan_inf_filter": False, "use_liger_kernel": fits_liger}
    notes = [word for word, true in (("liger", fits_liger), ("checkpointing", checkpointing)) if true]
    notes += ["padding-free"] if padding_free else ["padded: no flash_attn"] * (tool == "trl-best")
    model = load_unsloth(job, arm) if tool == "unsloth" else load(job, arm, tool, padding_free)
    trainer_type = _trainer_type(tool)
    if tool == "peft":
        trainer = trainer_type(model=model, args=TrainingArguments(**arguments), **more)
    else:
        from trl import SFTConfig

        own = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "padding_free": padding_free}
        args = SFTConfig(**arguments, **own)
        trainer = trainer_type(model=model, args=args, processing_class=tokenizer(), **more)
    trainer.train()
    kept = [float(loss) for loss in trainer.kept_losses]
    return [sum(kept[at : at + passes]) for at in range(0, len(kept), passes)], ", ".join(notes)


def _trainer_type(tool: str) -> Any:
    """The tool's trainer, which keeps each pass's loss on the device: reading it at every step would cost time."""
    parent: Any = Trainer
    if tool != "peft":
        from trl import SFTTrainer

        parent = SFTTrainer

    class Keeping(parent):
        kept_losses: list[torch.Tensor]

        def training_step(self, *arguments: Any, **options: Any) -> Any:
            loss = super().training_step(*arguments, **options)
            self.__dict__.setdefault("kept_losses", []).append(loss.detach())
            return loss

    return Keeping


def load(job: Job, arm: Arm, tool: str, flash: bool) -> Any:
    """The base as a tool loads it: in fp32 for TRL as documented, else in bf16; what trains is in fp32 everywhere."""
    more: dict[str, Any] = {"attn_implementation": "flash_attention_2"} if flash else {}
    dtype = torch.float32 if tool == "trl" and not arm.quantize else torch.bfloat16
    return load_for(arm, job.folder / "base", dtype, **more)


def load_unsloth(job: Job, arm: Arm) -> Any:
    """The base as Unsloth loads it."""
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]

    options = {"max_seq_length": MAX_LENGTH, "dtype": torch.bfloat16, "load_in_4bit": arm.quantize}
    model, _ = FastLanguageModel.from_pretrained(
        str(job.folder / "base"), **options, full_finetuning=not arm.lora, local_files_only=True
    )
    if arm.lora:
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        return FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, target_modules=names, random_state=0)
    if arm.top is not None:
        raise NotImplementedError("Unsloth has no way to train the top blocks alone")
    return model
