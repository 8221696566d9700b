"""One tool in its own process: it trains its arms one after the other on the same rows, and tells what each took."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.arms import Arm
from benchmarks.gpu.budget import do_items
from benchmarks.gpu.child import Job
from benchmarks.gpu.comparison import contest
from benchmarks.gpu.comparison.others import there, train_other
from benchmarks.gpu.runs import trains
from benchmarks.gpu.runs.clock import Clock
from benchmarks.gpu.runs.models import SHAPES, make_base, tokenizer
from benchmarks.gpu.runs.rows import count_tokens, encoded, in_order, write_rows

Runs = list[tuple[str, str]]


def contend(job: Job) -> Iterator[dict[str, Any]]:
    """Train the runs that the job names with its tool."""
    tool = job.arguments["tool"]
    if tool == "unsloth" and not there("unsloth"):
        yield {"name": tool, "skip": "not installed"}
        return
    make_base(job.folder / "base", job.arguments["model"], job.device, torch.bfloat16)
    job.clean()
    items = [(f"{arm} {rows} {tool}", partial(measure, job, tool, arm, rows)) for arm, rows in job.arguments["runs"]]
    yield from do_items(items, job.budget, job.clean)


def measure(job: Job, tool: str, name: str, kind: str) -> dict[str, Any]:
    """Train one arm on one kind of rows; seconds of its steps, losses, and memory."""
    arm = contest.make_arms(SHAPES[job.arguments["model"]]["num_hidden_layers"])[name]
    count = contest.rows_an_epoch(arm, contest.BATCH[job.device])
    file = job.folder / f"{kind}-{count}.jsonl"
    if not file.exists():
        write_rows(file, count, kind)
    rows = encoded(file, tokenizer())
    if len(rows) != count:
        raise RuntimeError(f"{file.name}: {len(rows)} of {count} rows can be used")
    warm, profiled = contest.steps_apart(name, arm.epochs)
    clock = Clock(job.device, warm, profiled)
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if tool == "llmtune":
        losses, note = train_llmtune(job, name, arm, file, clock)
    else:
        losses, note = train_other(job, tool, arm, in_order(rows, contest.BATCH[job.device], arm.epochs), clock)
    facts = {"arm": name, "rows_kind": kind, "tool": tool, "losses": losses, "note": note, **memory(job.device)}
    facts |= {"setup_s": clock.setup, "first_step_s": clock.first_step, "busy": clock.busy}
    return {**facts, "steps_s": clock.seconds(), "timed_s": clock.timed(), **contest.facts_of(rows, count_tokens(rows))}


def memory(device: str) -> dict[str, int]:
    """The most bytes that torch allocated and reserved on the card since the run began."""
    if device != "cuda":
        return {}
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def train_llmtune(job: Job, name: str, arm: Arm, file: Any, clock: Clock) -> tuple[list[float], str]:
    """Train as `llmtune train` does; losses and what its log says of frozen blocks."""
    plain = trains.settings(
        job.folder / "base",
        file,
        arm.method,
        job.device,
        model={"quantize": "4bit" if arm.quantize else "none"},
        train={"epochs": arm.epochs, "batch_size": contest.BATCH[job.device]},
    )
    folder = job.folder / "llmtune" / f"{name}-{file.stem}-{job.arguments.get('again', 'first')}"
    log = trains.train_run(trains.prepare_run(folder, plain, job.device), clock)
    return trains.losses(log), trains.notes(log)
