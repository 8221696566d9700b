"""Part S: the places where a step waits for the card, each by file and line."""

import contextlib
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from benchmarks.arms import LORA
from benchmarks.gpu.budget import do_items
from benchmarks.gpu.child import Job
from benchmarks.gpu.runs import trains

MOST = 1
"""Reads a step that are allowed."""
STEPS, WATCHED = 5, 3
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal")
"""Operations by which a host reads a tensor, for a machine without a card."""


class DispatchedReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that read a tensor's values, by the place that asked."""

    def __init__(self, places: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._places = places

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function.overloadpacket.__name__ in READS:
            self._places[asking_line()] += 1
        return function(*arguments, **(options or {}))


class ReadCounter(TrainerCallback):
    """Counts the reads of one step, from its beginning to the beginning of the next."""

    def __init__(self, device: str) -> None:
        self.device, self.places = device, Counter[str]()
        self._open = contextlib.ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if state.global_step == WATCHED:
            self._start()
        elif state.global_step == WATCHED + 1:
            self._stop()

    def _start(self) -> None:
        if self.device != "cuda":
            self._open.enter_context(DispatchedReads(self.places))
            return
        torch.cuda.synchronize()
        self._open.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = self._note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")

    def _note(self, message: Any, *rest: Any) -> None:
        if "called a synchronizing" in str(message):
            self.places[asking_line()] += 1

    def _stop(self) -> None:
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        self._open.close()


def asking_line() -> str:
    """The innermost line of llmtune, or else of a library that trains, that is being run."""
    frames = [f for f in traceback.extract_stack() if "benchmarks" not in f.filename and "/torch/" not in f.filename]
    ours = [frame for frame in frames if "llmtune" in frame.filename and "site-packages" not in frame.filename]
    library = [f for f in frames if any(f"/{name}/" in f.filename for name in ("transformers", "accelerate", "peft"))]
    chosen = library[-1] if library and frames.index(library[-1]) > _place(frames, ours) else (ours or frames)[-1]
    return f"{Path(chosen.filename).name}:{chosen.lineno}"


def _place(frames: list[Any], some: list[Any]) -> int:
    return frames.index(some[-1]) if some else -1


def parts(job: Job) -> Iterator[dict[str, Any]]:
    """One step of LoRA and one of full training."""
    methods = {"lora": {"kind": "full", "lr": 5e-4, "adapter": LORA}, "full": {"kind": "full", "lr": 1e-4}}
    yield from do_items([(name, partial(count, job, name, one)) for name, one in methods.items()], job.budget)


def count(job: Job, name: str, method: dict[str, Any]) -> dict[str, Any]:
    """The reads of one step by place."""
    plain = trains.settings(
        trains.base_of(job),
        Path(job.arguments["rows"]),
        method,
        job.device,
        train={"batch_size": 8, "max_steps": STEPS, "micro_batch_size": 8},
    )
    counter = ReadCounter(job.device)
    trains.train_run(trains.prepare_run(job.folder / "reads" / name, plain, job.device), counter)
    total = sum(counter.places.values())
    places = ", ".join(f"{place} {times}" for place, times in counter.places.most_common())
    text = f"{name}: {total} host reads a step of {MOST} allowed{f': {places}' if places else ''}"
    status = "PASS" if total <= MOST else "FAIL"
    # On a CPU they cost nothing, and it takes other ways: a figure for developers, no verdict.
    return {"text": text, "status": status if job.device == "cuda" else "", "places": dict(counter.places)}
