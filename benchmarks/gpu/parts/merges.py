"""Part M: a merge of each kind of run that earlier parts trained, each proved in a fresh process."""

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.budget import do_items
from benchmarks.gpu.child import Job
from llmtune.merging.step import merge
from llmtune.run import open_run

RUNS = {
    "4bit": "4bit-lora",
    "lora": "device/full-lora-fp32",
    "full": "device/full-none-fp32",
    "bottleneck": "device/full-bottleneck-fp32",
    "dora": "device/full-dora-fp32",
    "ia3": "device/full-ia3-fp32",
}
"""The runs by name, in the folder of the check."""


def parts(job: Job) -> Iterator[dict[str, Any]]:
    """Merge each run that is there."""
    there = {name: job.folder / run for name, run in RUNS.items() if (job.folder / run / "delta").is_dir()}
    yield from do_items([(name, partial(merge_one, run)) for name, run in there.items()], job.budget, job.clean)
    yield from ({"name": name, "skip": "no such run; parts A and Q train it"} for name in RUNS if name not in there)


def merge_one(folder: Path) -> dict[str, Any]:
    """Merge one run and give the facts of its proof."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        facts = merge(open_run(folder))
    text = f"{folder.name} gap {facts['gap']:.0e} bound {facts['bound']:.0e}"
    return {"text": text, "status": "PASS" if facts["gap"] <= facts["bound"] else "FAIL", "facts": facts}
