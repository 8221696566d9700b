"""`python -m benchmarks.gpu.child JOB.json`: does one task and writes a line of JSON per result."""

import gc
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.budget import Budget

FIRST = 3.0
"""Seconds that the first item of a part is taken to need on a card, where kernels are loaded."""


@dataclass(frozen=True)
class Job:
    """What a task is given in its process."""

    device: str
    """cpu or cuda."""
    folder: Path
    budget: Budget
    arguments: dict[str, Any]

    def clean(self) -> None:
        """Free what the last item left, on the card too."""
        gc.collect()
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()


def main(file: Path) -> None:
    """Do the task in a file."""
    task = json.loads(file.read_text())
    module, function = task["function"].split(":")
    job = Job(
        task["device"],
        Path(task["folder"]),
        Budget(task["until"], FIRST if task["device"] == "cuda" else 0.0),
        task["arguments"],
    )
    with open(task["results"], "a", encoding="utf-8") as results:
        for result in getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(job):
            results.write(json.dumps(result, default=str) + "\n")
            results.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
