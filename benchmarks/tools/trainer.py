"""transformers' Trainer, with PEFT where the arm has LoRA: `python -m benchmarks.tools.trainer JOB.json`."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from benchmarks.arms import ARMS
from benchmarks.tools.clock import Clock, serve
from benchmarks.tools.models import load_for


class Counter:
    """Pads batches on the right, and counts their tokens."""

    def __init__(self, base: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
        self._collate, self.tokens = DataCollatorForSeq2Seq(tokenizer), 0

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        batch = self._collate(examples)
        self.tokens += int(batch["attention_mask"].sum())
        return batch


def arguments(job: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a Trainer, those of TRL and LLaMA-Factory too: the rows in their order, and no evaluation."""
    return {
        "output_dir": str(Path(job["folder"]) / "out"),
        "per_device_train_batch_size": job["batch"],
        "max_steps": job["steps"],
        "learning_rate": ARMS[job["arm"]].method["lr"],
        "lr_scheduler_type": "constant",
        "bf16": job["precision"] == "bf16",
        "use_cpu": True,
        "seed": 0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def load(job: dict[str, Any], in_fp32: bool = False) -> Any:
    """The base of a job as this arm trains it: stored in bf16, except for what trains, or all of it in fp32."""
    dtype = torch.float32 if in_fp32 or job["precision"] == "fp32" else torch.bfloat16
    torch.manual_seed(0)
    return load_for(ARMS[job["arm"]], Path(job["base"]), dtype)


def parts(job: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """What a Trainer takes beside its arguments and its model: rows, collator and callback."""
    from datasets import Dataset

    rows = Dataset.from_list(json.loads(Path(job["examples"]).read_text()))
    return {"train_dataset": rows, "data_collator": Counter(job["base"]), "callbacks": [clock]}


def train(job: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """Train, save what was trained, and count its tokens."""
    from transformers import Trainer, TrainingArguments

    named = arguments(job) | {"train_sampling_strategy": "sequential"}
    return finish(Trainer(args=TrainingArguments(**named), model=load(job), **parts(job, clock)))


def finish(trainer: Any) -> dict[str, Any]:
    """Train and save with a trainer, and count the tokens that its collator saw."""
    trainer.train()
    trainer.save_model()
    return {"tokens": trainer.data_collator.tokens}


if __name__ == "__main__":
    serve(train)
