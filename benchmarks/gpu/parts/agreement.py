"""Part A: every method with every adapter for three steps, on the CPU and on the device."""

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from benchmarks.gpu.budget import do_items
from benchmarks.gpu.child import Job
from benchmarks.gpu.report import Line, judged, undone

METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full", "lr": 0.01},
    "frozen": {"kind": "frozen", "reach": 2, "lr": 0.01},
    "gradual": {"kind": "gradual", "reaches": [1, 2, "all"], "lr": 0.01},
    "discriminative": {"kind": "discriminative", "lr": 0.01},
    "staged": {"kind": "staged", "stages": [{"until": 0.34, "lr": 0.01}, {"until": 1.0, "reach": 1, "lr": 0.01}]},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "lora": {"kind": "lora", "rank": 4, "alpha": 8},
    "dora": {"kind": "lora", "rank": 4, "alpha": 8, "dora": True},
    "ia3": {"kind": "ia3"},
    "bottleneck": {"kind": "bottleneck", "size": 4},
}
LOSS = {"fp32": 1e-5, "bf16": 2e-2}
"""How far a loss may be from the CPU's, relative."""
WEIGHTS = 1e-3
"""How far the trained tensors may be from the CPU's in fp32, relative in the norm."""
STEPS, BATCH = 3, 4


def cells() -> list[tuple[str, str, str]]:
    """All method, adapter, precision: fp32 for each pair, bf16 for no adapter and for LoRA."""
    pairs = [(method, adapter) for method in METHODS for adapter in ADAPTERS]
    return [
        *((method, adapter, "fp32") for method, adapter in pairs),
        *((method, adapter, "bf16") for method, adapter in pairs if adapter in ("none", "lora")),
    ]


def train_cells(job: Job) -> Iterator[dict[str, Any]]:
    """Train each cell and keep its run folder, named after the cell."""
    items = [("/".join(cell), partial(train_cell, job, *cell)) for cell in cells()]
    yield from do_items(items, job.budget, job.clean)


def train_cell(job: Job, method: str, adapter: str, precision: str) -> dict[str, Any]:
    """Losses, the file of the delta, a digest of what never trains, and what of that changed."""
    from benchmarks.gpu.runs import trains

    plain = trains.settings(
        trains.base_of(job),
        Path(job.arguments["rows"]),
        {**METHODS[method], "adapter": ADAPTERS[adapter]},
        job.device,
        model={"precision": precision},
        train={"batch_size": BATCH, "max_steps": STEPS, "micro_batch_size": 2},
        memory={"frozen_blocks": "recompute"},
    )
    run = trains.prepare_run(job.folder / job.arguments["runs"] / f"{method}-{adapter}-{precision}", plain, job.device)
    watch = trains.FrozenWatch()
    log = trains.train_run(run, watch)
    digest = hashlib.sha256()
    for name in sorted(watch.before):
        digest.update(name.encode() + watch.before[name].float().numpy().tobytes())
    frozen = {"frozen": digest.hexdigest(), "changed": watch.changed}
    return {"losses": trains.losses(log), "delta": trains.delta_file(run), "run": str(run.path), **frozen}


def relative_gap(ours: list[float], expected: list[float]) -> float:
    """The largest difference of two lists of numbers, relative to the expected ones; infinite for other lengths."""
    if len(ours) != len(expected) or not ours:
        return float("inf")
    return max(abs(one - other) / max(abs(other), 1e-12) for one, other in zip(ours, expected, strict=True))


def tensor_gap(ours: Path | str, expected: Path | str) -> float:
    """How far the tensors of one file are from those of another, relative in the norm; infinite for other names."""
    left, right = load_file(ours), load_file(expected)
    if set(left) != set(right):
        return float("inf")
    wide = {name: (left[name].astype(np.float64), right[name].astype(np.float64)) for name in left}
    distance = sum(float(((one - other) ** 2).sum()) for one, other in wide.values())
    norm = sum(float((other**2).sum()) for _, other in wide.values())
    return float((distance / max(norm, 1e-30)) ** 0.5)


def judge(name: str, ours: dict[str, Any], cpu: dict[str, Any]) -> Line:
    """The line of one cell, which compares the device's answer with the CPU's."""
    line = undone("A", ours) or undone("A", {**cpu, "name": f"{name} on the CPU"})
    if line:
        return line
    precision = name.rsplit("/", 1)[-1]
    gap, weights = relative_gap(ours["losses"], cpu["losses"]), tensor_gap(ours["delta"], cpu["delta"])
    frozen = not ours["changed"] and ours["frozen"] == cpu["frozen"]
    passes = gap <= LOSS[precision] and frozen and (precision == "bf16" or weights <= WEIGHTS)
    losses = " ".join(f"{loss:.4f}" for loss in ours["losses"])
    text = f"{name} loss {losses} gap {gap:.0e} weights {weights:.0e} frozen {'equal' if frozen else 'DIFFERENT'}"
    facts = {"losses": ours["losses"], "cpu": cpu["losses"], "gap": gap, "weights": weights, "frozen": frozen}
    return judged("A", text, passes, **facts, seconds=ours["seconds"])
