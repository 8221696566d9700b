"""transformers' Trainer, with PEFT where the arm has LoRA: `python -m benchmarks.tools.trainer JOB.json`."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from benchmarks.arms import ARMS
from benchmarks.tools.clock import Clock, arguments, serve
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


def in_order(job: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a trainer that takes encoded rows as they come."""
    return arguments(job) | {"remove_unused_columns": False, "train_sampling_strategy": "sequential"}


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
    """Train, save as the tool does, and count the tokens."""
    from transformers import Trainer, TrainingArguments

    return finish(Trainer(args=TrainingArguments(**in_order(job)), model=load(job), **parts(job, clock)))


def finish(trainer: Any) -> dict[str, Any]:
    """Train and save with a trainer, and count the tokens that its collator saw."""
    trainer.train()
    trainer.save_model()
    return {"tokens": trainer.data_collator.tokens}


if __name__ == "__main__":
    serve(train)
