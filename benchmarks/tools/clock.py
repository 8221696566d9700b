"""What every other tool's process does: it reads its job, trains, and writes what it took; needs nothing of llmtune."""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from benchmarks.arms import ARMS

RESULT = "result.json"


class Clock(TrainerCallback):
    """Times a training of transformers' Trainer from its begin to the end of its last step, and keeps the losses."""

    def __init__(self) -> None:
        self.began = self.ended = math.nan
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.ended = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **named: Any) -> None:
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))

    def figures(self) -> dict[str, Any]:
        """Seconds of the training, and the loss of each step."""
        return {"seconds": self.ended - self.began, "losses": self.losses}


def arguments(job: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a job's training that all tools take by these names: no evaluation, no reports."""
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
    }


def serve(train: Callable[[dict[str, Any], Clock], dict[str, Any]]) -> None:
    """Train the job in the file that the command line names, and write the result beside it."""
    file = Path(sys.argv[1])
    job = json.loads(file.read_text())
    if job["tuned"]:
        settle_memory()
    clock = Clock()
    figures = train(job, clock)
    (file.parent / RESULT).write_text(json.dumps(clock.figures() | figures))


def settle_memory() -> None:
    """Set the allocator of this process as that of llmtune's training process is set."""
    from llmtune.machine.memory import bound_primitive_cache, keep_freed

    bound_primitive_cache()
    keep_freed()
