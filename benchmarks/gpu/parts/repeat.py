"""Part R: the same run twice, and resumed from the middle, to the bit; with and without deterministic algorithms."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms import LORA
from benchmarks.gpu.budget import do_items
from benchmarks.gpu.child import Job
from benchmarks.gpu.parts.agreement import tensor_gap
from benchmarks.gpu.runs import trains
from benchmarks.gpu.runs.clock import Clock
from benchmarks.gpu.runs.models import make_base
from benchmarks.gpu.runs.rows import write_rows

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "full", "lr": 5e-4, "adapter": LORA},
    "full": {"kind": "full", "lr": 1e-4},
    "gradual": {"kind": "gradual", "reaches": [0, 2, "all"], "lr": 1e-4},
}
STEPS, BATCH = 6, 4


def as_it_comes(job: Job) -> Iterator[dict[str, Any]]:
    """Each method with the algorithms that torch chooses; the answer is a fact, not a promise."""
    yield from do_items([(name, partial(repeat, job, name, False)) for name in METHODS], job.budget, job.clean)


def deterministic(job: Job) -> Iterator[dict[str, Any]]:
    """Each method with `train.deterministic: true`, which promises the same bits."""
    yield from do_items([(name, partial(repeat, job, name, True)) for name in METHODS], job.budget, job.clean)


def repeat(job: Job, name: str, strict: bool) -> dict[str, Any]:
    """Train twice, and once with a break in the middle; compare what was trained."""
    base = make_base(job.folder / f"{job.arguments['mid']}-bf16", job.arguments["mid"], job.device, torch.bfloat16)
    rows = job.folder / "long-few.jsonl"
    if not rows.exists():
        write_rows(rows, STEPS * BATCH, "long")
    words = "deterministic" if strict else "as it comes"
    folder = job.folder / "repeat" / f"{name}-{words.replace(' ', '-')}"
    clock = Clock(job.device, warm=(0, 1))
    first, first_losses = train_once(job, folder / "first", base, rows, name, strict, clock)
    again, again_losses = train_once(job, folder / "again", base, rows, name, strict)
    resumed, resumed_losses = train_cut(job, folder / "resumed", base, rows, name, strict)
    twice, broken = tensor_gap(again, first), tensor_gap(resumed, first)
    same = twice == broken == 0 and first_losses == again_losses == resumed_losses
    text = f"{name}, {words}: twice {equal(twice)}; resumed {equal(broken)}; {clock.median() * 1000:.1f} ms a step"
    status = "" if not strict else "PASS" if same else "FAIL"
    if not strict and job.device == "cpu":  # a promise on CPUs
        status = "PASS" if same else "FAIL"
    return {"text": text, "status": status, "twice": twice, "resumed": broken, "step_s": clock.median()}


def equal(gap: float) -> str:
    """The gap between two runs in words."""
    return "bit-equal" if gap == 0 else f"differs by {gap:.0e}"


def _plain(job: Job, base: Path, rows: Path, name: str, strict: bool) -> dict[str, Any]:
    more: dict[str, Any] = {"deterministic": True} if strict else {}
    train = {"batch_size": BATCH, "max_steps": STEPS, "save_every": 0.5, **more}
    return trains.settings(base, rows, METHODS[name], job.device, train=train)


def train_once(
    job: Job, folder: Path, base: Path, rows: Path, name: str, strict: bool, *callbacks: Any
) -> tuple[str, list[float]]:
    """The file of the delta and the losses of a run without a break."""
    run = trains.prepare_run(folder, _plain(job, base, rows, name, strict), job.device)
    log = trains.train_run(run, *callbacks)
    return trains.delta_file(run), trains.losses(log)


def train_cut(job: Job, folder: Path, base: Path, rows: Path, name: str, strict: bool) -> tuple[str, list[float]]:
    """The same of a run that is cut a step behind its checkpoint in the middle, and resumed from there."""
    run = trains.prepare_run(folder, _plain(job, base, rows, name, strict), job.device)
    try:
        trains.train_run(run, trains.Moment(STEPS // 2 + 1))
    except KeyboardInterrupt:
        job.clean()
    if not any(run.checkpoints.glob("step-*")):
        raise RuntimeError("the run was cut and had left no checkpoint")
    log = trains.train_run(run)
    return trains.delta_file(run), trains.losses(log)
