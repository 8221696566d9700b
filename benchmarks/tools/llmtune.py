"""llmtune as a user starts it: a recipe, the command that trains it, and what the run's log says."""

import json
from pathlib import Path
from typing import Any

from benchmarks.arms import ARMS
from benchmarks.rows import MAX_LENGTH
from llmtune.run import Run
from llmtune.run_log import read_log


def recipe(job: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a job: what the other tools are told, and defaults for all else. Nobody saves before the end."""
    arm = ARMS[job["arm"]]
    return {
        "model": {"base": job["base"], "quantize": "4bit" if arm.quantize else "none", "precision": job["precision"]},
        "data": {"train": job["rows"], "eval_fraction": 0, "max_length": MAX_LENGTH},
        "method": arm.method,
        "train": {"epochs": arm.epochs, "batch_size": job["batch"], "warmup": 0, "schedule": "constant", "seed": 0}
        | {"group_by_length": False, "save_every": 1.0},
        "eval": {"suite": "none"},
        "launch": {"accelerate": "cpu"},
    }


def command(python: str, job: dict[str, Any]) -> list[str]:
    """The command that trains a job, whose recipe is written to its folder."""
    folder = Path(job["folder"])
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe(job)))
    return [python, "-m", "llmtune", "train", str(file), "--out", str(folder / "run")]


def figures(job: dict[str, Any]) -> dict[str, Any]:
    """What a run's log says: seconds from before the trainer is made, losses, tokens, what became of frozen blocks."""
    log = read_log(Run(Path(job["folder"]) / "run").log_file)
    steps = [entry for entry in log if "loss" in entry]
    notes = [entry["frozen_blocks"] for entry in log if "frozen_blocks" in entry]
    last = {"seconds": steps[-1]["seconds"], "tokens": steps[-1]["tokens"], "frozen_blocks": (notes or [""])[0]}
    return {**last, "losses": [entry["loss"] for entry in steps]}
