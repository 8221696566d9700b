"""One training of llmtune in this process: a recipe, a run folder, callbacks that watch, and the log that it leaves."""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from benchmarks.gpu.child import Job
from llmtune import recipe as recipes
from llmtune.run import Run, open_run
from llmtune.run_log import read_log
from llmtune.training.loop import train
from llmtune.training.prepare import prepare


def settings(base: Path, rows: Path, method: dict[str, Any], device: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe as plain values; `sections` add to its own sections or replace keys of theirs."""
    plain: dict[str, dict[str, Any]] = {
        "model": {"base": str(base), "precision": "bf16"},
        "data": {"train": str(rows), "eval_fraction": 0, "max_length": 1024, "overlap": "warn"},
        "method": method,
        "train": {"epochs": 1, "batch_size": 16, "warmup": 0, "schedule": "constant", "save_every": 1, "seed": 0}
        | {"group_by_length": False},
        "eval": {"suite": "none"},
        "launch": {"accelerate": "cpu" if device == "cpu" else "single_gpu"},
    }
    return {key: {**plain.get(key, {}), **sections.get(key, {})} for key in {**plain, **sections}}


def prepare_run(folder: Path, plain: dict[str, Any], device: str) -> Run:
    """The run folder of a recipe of plain values."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".yaml")
    file.write_text(json.dumps(plain))
    return prepare(recipes.load(file), folder, 0 if device == "cpu" else 1, overwrite=True)


def train_run(run: Run, *callbacks: TrainerCallback) -> list[dict[str, Any]]:
    """Train a prepared run in this process, quietly; gives its log."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train(open_run(run.path), callbacks=list(callbacks))
    return read_log(run.log_file)


def losses(log: Sequence[dict[str, Any]]) -> list[float]:
    """The losses of the steps in a log."""
    return [entry["loss"] for entry in log if "loss" in entry]


def notes(log: Sequence[dict[str, Any]]) -> str:
    """What a log says of frozen blocks."""
    return "; ".join(entry["frozen_blocks"] for entry in log if "frozen_blocks" in entry)


class FrozenWatch(TrainerCallback):
    """Keeps a copy of what never trains, and tells at the end whether any bit of it changed."""

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.changed: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **named: Any) -> None:
        # Before the first stage, all that ever trains requires a gradient.
        self.before = {name: p.detach().cpu().clone() for name, p in _frozen(model).items()}

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **named: Any) -> None:
        after = dict(model.named_parameters())
        self.changed = [name for name, one in self.before.items() if not torch.equal(after[name].detach().cpu(), one)]


def _frozen(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if not p.requires_grad and p.numel()}


class Moment(TrainerCallback):
    """Raises KeyboardInterrupt once a step has ended: a run that is cut short behind a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def delta_file(run: Run) -> str:
    """The file of a run's trained tensors."""
    return str(next(run.delta.glob("*.safetensors")))


def base_of(job: Job) -> Path:
    """The base that a job names."""
    return Path(job.arguments["base"])
