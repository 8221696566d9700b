"""One run of the bench in its own process: `python -m benchmarks.worker JOB.json` writes result.json beside it."""

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from benchmarks.arms import ARMS, Arm
from benchmarks.models import load_for
from llmtune import recipe
from llmtune.data.batches.collate import Collator
from llmtune.files import read_json, write_json
from llmtune.model.base import Base
from llmtune.model.tokens import load_tokenizer
from llmtune.run_log import read_log
from llmtune.training.loop import train
from llmtune.training.prepare import prepare


class Clock(TrainerCallback):
    """Records when training began, when each step ended, and each step's loss."""

    def __init__(self) -> None:
        self.began, self.cpu_began, self.cpu = math.nan, math.nan, 0.0
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.began, self.cpu_began = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.cpu = time.process_time() - self.cpu_began

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **named: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


class Counter:
    """Collates batches, and counts their tokens and slots (tokens and padding)."""

    def __init__(self, pad: int) -> None:
        self.collator, self.tokens, self.slots = Collator(pad), 0, 0

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator(examples)
        self.tokens += int(batch["attention_mask"].sum())
        self.slots += batch["attention_mask"].numel()
        return batch


def llmtune(job: dict[str, Any], arm: Arm, clock: Clock) -> dict[str, Any]:
    """Train as `llmtune train` does, in a run folder prepared here."""
    folder = Path(job["folder"])
    settings = {
        "model": {"base": job["base"], "quantize": "4bit" if arm.quantize else "none", "precision": job["precision"]},
        "data": {"train": job["rows"], "eval_fraction": 0, "max_length": job["max_length"], "overlap": "warn"},
        "method": arm.method,
        "train": {"epochs": arm.epochs, "batch_size": job["batch"], "warmup": 0, "schedule": "constant"}
        | {"micro_batch_size": job["batch"], "save_every": 1, "seed": 0, "group_by_length": job["grouped"]},
        "eval": {"suite": "none"},
        "launch": {"accelerate": "single_gpu" if torch.cuda.is_available() else "cpu"},
    }
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    run = prepare(recipe.load(folder / "recipe.yaml"), folder / "run", torch.cuda.device_count())
    train(run, callbacks=[clock])
    log = read_log(run.log_file)
    notes = [entry["frozen_blocks"] for entry in log if "frozen_blocks" in entry]
    steps = [entry for entry in log if "loss" in entry]
    clock.losses = [entry["loss"] for entry in steps]
    padding = sum(entry["padding"] for entry in steps) / len(steps)
    return {"tokens": steps[-1]["tokens"], "padding": padding, "frozen_blocks": (notes or [""])[0]}


def others(job: dict[str, Any], arm: Arm, clock: Clock) -> dict[str, Any]:
    """Train the same batches with TRL's SFTTrainer as documented, the same at its fastest, or transformers' Trainer."""
    counter = Counter(0)
    documented = job["tool"] == "trl"
    # As documented, the model loads in fp32 and runs under bf16 autocast; the fast variants load it in bf16.
    dtype = torch.float32 if documented or job["precision"] == "fp32" else torch.bfloat16
    model = load_for(arm, Path(job["base"]), dtype)
    names = {
        "output_dir": str(Path(job["folder"]) / "out"),
        "per_device_train_batch_size": job["batch"],
        "max_steps": job["steps"],
        "learning_rate": arm.method["lr"],
        "lr_scheduler_type": "constant",
        "bf16": job["precision"] == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "seed": 0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
    }
    data = Dataset.from_list(read_json(Path(job["examples"])))
    more = {"model": model, "train_dataset": data, "data_collator": counter, "callbacks": [clock]}
    if job["tool"] == "trainer":
        trainer = Trainer(args=TrainingArguments(**names), **more)
    else:
        settings = {} if documented else {"gradient_checkpointing": False}
        args = SFTConfig(**names, **settings, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
        trainer = SFTTrainer(args=args, processing_class=load_tokenizer(base(job)), **more)
    trainer.train()
    trainer.save_model(str(Path(job["folder"]) / "saved"))
    return {"tokens": counter.tokens, "padding": 1 - counter.tokens / counter.slots, "frozen_blocks": ""}


def base(job: dict[str, Any]) -> Base:
    """Return the base model, which the bench has located."""
    return Base(Path(job["base"]), job["base"], None, None)


def main(file: Path) -> None:
    """Run the job in a file and write its measurements to result.json."""
    job = read_json(file)
    clock, arm = Clock(), ARMS[job["arm"]]
    torch.manual_seed(0)
    result = (llmtune if job["tool"] == "llmtune" else others)(job, arm, clock)
    seconds = clock.ends[-1] - clock.began
    steps = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]
    memory = {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if torch.cuda.is_available():
        memory["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    write_json(
        file.with_name("result.json"),
        {
            **result,
            **memory,
            "seconds": seconds,
            "seconds_per_step": seconds / len(clock.ends),
            "cpu_s_per_step": clock.cpu / len(clock.ends),
            "later_step": sorted(steps)[len(steps) // 2] if steps else seconds,
            "tokens_per_s": result["tokens"] / seconds,
            "losses": clock.losses,
            "final_loss": sum(clock.losses[-5:]) / len(clock.losses[-5:]),
        },
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
