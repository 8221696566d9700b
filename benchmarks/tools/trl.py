"""TRL's SFTTrainer as its documentation shows it, or at its best: `python -m benchmarks.tools.trl JOB.json`.

As documented, the model is in fp32 under bf16 autocast, and activations are checkpointed; at its best it is in bf16
and keeps its activations.
"""

from typing import Any

from transformers import AutoTokenizer

from benchmarks.tools.clock import Clock, serve
from benchmarks.tools.trainer import finish, in_order, load, parts


def train(job: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """Train, save as the tool does, and count the tokens."""
    from trl import SFTConfig, SFTTrainer

    best = {"gradient_checkpointing": False} if job["tuned"] else {}
    config = SFTConfig(**in_order(job), **best, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    model = load(job, in_fp32=not job["tuned"])
    return finish(SFTTrainer(args=config, model=model, processing_class=tokenizer, **parts(job, clock)))


if __name__ == "__main__":
    serve(train)
