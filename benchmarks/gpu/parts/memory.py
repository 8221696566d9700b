"""The memory part: what llmtune predicts for a run, beside what torch allocated and reserved."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms import LORA
from benchmarks.gpu.budget import do_items
from benchmarks.gpu.child import Job
from benchmarks.gpu.runs import trains
from benchmarks.gpu.runs.models import make_base, tokenizer
from benchmarks.gpu.runs.rows import encoded, write_rows
from llmtune.estimate.memory import forecast
from llmtune.estimate.passes import setting_of
from llmtune.model.files.locate import locate_base
from llmtune.run import Run
from llmtune.training.bases.base import check_model
from llmtune.training.plan_table import build_layout

CLOSE = 0.10
"""How far a prediction may be from what was allocated, relative."""
STEPS = 3
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "full", "lr": 5e-4, "adapter": LORA},
    "full": {"kind": "full", "lr": 1e-4},
    "frozen8": {"kind": "frozen", "reach": 8, "lr": 5e-4},
    "qlora": {"kind": "full", "lr": 5e-4, "adapter": LORA},
}
Case = tuple[str, str, int, bool]
"""A method, a model, rows a pass (of about 512 tokens), and activation checkpointing."""


def parts(job: Job) -> Iterator[dict[str, Any]]:
    """Each case that the part names: for `correct` a few on the middle model, for `speed` more on the large one."""
    cases: list[Case] = [tuple(case) for case in job.arguments.get("cases") or quick_cases(job.arguments["mid"])]
    items = [(case_name(case), partial(measure, job, case)) for case in cases]
    yield from do_items(items, job.budget, job.clean)


def quick_cases(model: str) -> list[Case]:
    """LoRA and full training on one model, with and without checkpointing."""
    return [(method, model, 4, checkpointing) for method in ("lora", "full") for checkpointing in (False, True)]


def thorough_cases(model: str) -> list[Case]:
    """Every method at some 2,000 and 8,000 tokens a pass, without checkpointing, and LoRA with it."""
    sizes = [(method, model, rows, False) for rows in (4, 16) for method in METHODS]
    return [*sizes, ("lora", model, 16, True), ("full", model, 16, True)]


def case_name(case: Case) -> str:
    """A case in words."""
    method, model, rows, checkpointing = case
    return f"{model} {method} {rows} rows a pass, {'' if checkpointing else 'no '}checkpointing"


def measure(job: Job, case: Case) -> dict[str, Any]:
    """Predicted, allocated and reserved bytes of three steps; no figures on a CPU, where it trains all the same."""
    method, model, count, checkpointing = case
    base = make_base(job.folder / f"{model}-bf16", model, job.device, torch.bfloat16)
    rows = write_rows(job.folder / f"memory-{count}.jsonl", count, "long")
    plain = trains.settings(
        base,
        rows,
        METHODS[method] if model != "tiny" or method != "frozen8" else {**METHODS[method], "reach": 2},
        job.device,
        model={"quantize": "4bit" if method == "qlora" else "none"},
        train={
            "batch_size": count,
            "micro_batch_size": count,
            "max_steps": STEPS,
            "activation_checkpointing": checkpointing,
        },
        memory={"frozen_blocks": "recompute"},
    )
    run = trains.prepare_run(job.folder / "memory" / case_name(case).replace(" ", "-"), plain, job.device)
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trains.train_run(run)
    expected = predicted(run, [len(row["input_ids"]) for row in encoded(rows, tokenizer())], checkpointing)
    if job.device != "cuda":
        return {"skip": "no GPU", "predicted": expected}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {**in_words(case_name(case), expected, allocated, reserved), "case": list(case)}


def predicted(run: Run, lengths: list[int], checkpointing: bool) -> int:
    """The peak in bytes that llmtune predicts for one pass of rows of these lengths."""
    recipe = run.recipe()
    base = locate_base(recipe.model)
    layout = build_layout(recipe, base, check_model(recipe, base))
    return forecast(layout, setting_of(recipe, 1, "cuda"), max(lengths)).peak(sum(lengths), checkpointing)


def in_words(name: str, expected: int, allocated: int, reserved: int) -> dict[str, Any]:
    """The line of a case, which fails where the prediction is off by over a tenth of what was allocated."""
    gb = 2**30
    figures = f"allocated {allocated / gb:.2f} reserved {reserved / gb:.2f} GB"
    facts = {"predicted": expected, "allocated": allocated, "reserved": reserved}
    off = expected / allocated - 1
    text = f"{name}: predicted {expected / gb:.2f} {figures} ({off:+.0%})"
    return {"text": text, "status": "PASS" if abs(off) <= CLOSE else "FAIL", **facts}


def cases_for(model: str, folder: Path) -> list[Case]:
    """The cases of `speed`, and two of the 8b model where its files fit into the work folder."""
    roomy = model == "1b" and shutil.disk_usage(folder).free > 40 * 2**30
    return [*thorough_cases(model), *([("lora", "8b", 16, True), ("qlora", "8b", 8, True)] if roomy else [])]
