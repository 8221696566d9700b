"""Part P: frozen blocks whose outputs are kept, beside the same run that computes them at every step."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.budget import do_items
from benchmarks.gpu.child import Job
from benchmarks.gpu.parts.agreement import relative_gap
from benchmarks.gpu.runs import trains
from benchmarks.gpu.runs.clock import Clock
from benchmarks.gpu.runs.models import make_base
from benchmarks.gpu.runs.rows import write_rows

ALLOWED = {"bf16": 1e-2, "fp32": 1e-5}
"""How far the losses with kept outputs may be from those without, relative."""
BATCH, EPOCHS, PER_EPOCH = 8, 3, 2


def parts(job: Job) -> Iterator[dict[str, Any]]:
    """The large model in bf16, then the middle one in fp32."""
    pairs = (("large", "bf16", 4), ("mid", "fp32", 2))
    yield from do_items([(f"{s} {p}", partial(beside, job, s, p, top)) for s, p, top in pairs], job.budget, job.clean)


def beside(job: Job, size: str, precision: str, top: int) -> dict[str, Any]:
    """Losses with and without kept outputs, the seconds to build them, and those of a step both ways."""
    name = job.arguments[size]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    base = make_base(job.folder / f"{name}-{precision}", name, job.device, dtype)
    rows = write_rows(job.folder / "kept.jsonl", BATCH * PER_EPOCH, "long")
    top = min(top, 2) if name == "tiny" else top
    answers = {}
    for way in ("cache", "recompute"):
        plain = trains.settings(
            base,
            rows,
            {"kind": "frozen", "reach": top, "lr": 1e-4},
            job.device,
            model={"precision": precision},
            train={"batch_size": BATCH, "epochs": EPOCHS},
            memory={"frozen_blocks": way},
        )
        clock = Clock(job.device, warm=(0, 1))
        run = trains.prepare_run(job.folder / "kept" / f"{size}-{way}", plain, job.device)
        log = trains.train_run(run, clock)
        answers[way] = (trains.losses(log), clock, trains.notes(log))
        job.clean()
    (kept, kept_clock, note), (plain_losses, plain_clock, _) = answers["cache"], answers["recompute"]
    gap = relative_gap(kept, plain_losses)
    used = "cached below" in note or "reused below" in note
    text = (
        f"{name} {precision}: losses gap {gap:.0e} of {ALLOWED[precision]:.0e}; built in {kept_clock.setup:.2f} s; "
        f"{kept_clock.median() * 1000:.1f} ms a step kept, {plain_clock.median() * 1000:.1f} ms computed"
        f"{'' if used else f'; NOT KEPT: {note}'}"
    )
    passes = used and gap <= ALLOWED[precision]
    facts = {"losses": kept, "computed": plain_losses, "note": note, "build_s": kept_clock.setup}
    return {"text": text, "status": "PASS" if passes else "FAIL", **facts}
