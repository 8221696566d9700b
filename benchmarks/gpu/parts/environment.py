"""Part E: the card, the driver and the libraries, and the rates that everything else is measured against."""

import importlib.metadata
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.child import Job
from llmtune.estimate.cards import CARDS
from llmtune.machine.gpus import driver_version

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "triton")
OPTIONAL = ("liger_kernel", "flash_attn", "unsloth")


def measure(job: Job) -> Iterator[dict[str, Any]]:
    """The facts of the machine in one result."""
    yield {"name": "machine", **versions(), **card(job.device), **rates(job)}


def versions() -> dict[str, Any]:
    """The versions of the packages that matter, and of optional ones that are there."""
    installed = {}
    for name in (*PACKAGES, *OPTIONAL):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"versions": installed, "cuda": torch.version.cuda}


def card(device: str) -> dict[str, Any]:
    """Name, driver, memory and stated rate of the card; nothing on a CPU."""
    if device == "cpu":
        return {"card": "cpu", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    capability, peak = list(torch.cuda.get_device_capability(0)), peak_tflops(properties.name)
    facts = {"card": properties.name, "capability": capability, "driver": driver_version()}
    return {**facts, "free": free, "total": total, "peak_tflops": peak, "bf16": torch.cuda.is_bf16_supported()}


def peak_tflops(name: str) -> float | None:
    """The rate that the maker states for a card, by the name that torch gives it; None for one that is not known."""
    word = name.lower().replace(" ", "")
    rates = (card.rate for card in CARDS.values() if card.rate and card.name.partition("-")[0] in word)
    return next((rate / 1e12 for rate in rates), None)


def seconds_of(work: Callable[[], object], device: str, times: int = 10) -> float:
    """The median seconds of some work, by events on a card; two runs before do not count."""
    taken = []
    for _ in range(times + 2):
        began = time.perf_counter()
        if device == "cuda":
            start, end = _event(), _event()
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(end) / 1000)
        else:
            work()
            taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:])


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def rates(job: Job) -> dict[str, float]:
    """Rates in TFLOP/s and GB/s: a square bf16 product, a copy on the device, copies to it, reads of a file."""
    size, copied = (8192, 2**30) if job.device == "cuda" else (512, 2**24)
    left, right = torch.randn(2, size, size, device=job.device).bfloat16()
    facts = {"gemm_tflops": 2 * size**3 / seconds_of(lambda: torch.mm(left, right), job.device) / 1e12}
    source = torch.zeros(copied, dtype=torch.uint8, device=job.device)
    target = torch.empty_like(source)
    facts["copy_gb_s"] = 2 * copied / seconds_of(lambda: target.copy_(source), job.device) / 1e9
    for name, pinned in (("h2d_pageable_gb_s", False), ("h2d_pinned_gb_s", True)):
        if job.device == "cuda":
            host = torch.zeros(copied // 4, dtype=torch.uint8, pin_memory=pinned)
            part = target[: copied // 4]
            copy = lambda part=part, host=host: part.copy_(host, non_blocking=True)  # noqa: E731
            facts[name] = host.numel() / seconds_of(copy, job.device, 5) / 1e9
    facts["disk_gb_s"] = read_rate(Path(job.arguments["disk"]), 2**28 if job.device == "cuda" else 2**22)
    return facts


def read_rate(file: Path, size: int) -> float:
    """The rate in GB/s at which a file of this folder is read that the page cache was asked to forget."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(os.urandom(2**20) * (size // 2**20))
    with file.open("rb", buffering=0) as opened:
        os.fsync(opened.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        while opened.read(2**24):
            pass
        seconds = time.perf_counter() - began
    file.unlink()
    return size / seconds / 1e9


def in_words(facts: dict[str, Any]) -> str:
    """The machine in one line."""
    parts = [f"{facts['card']}"]
    if facts.get("driver"):
        parts.append(f"driver {facts['driver']}")
    if facts.get("total"):
        parts.append(f"{facts['free'] / 2**30:.0f} of {facts['total'] / 2**30:.0f} GB free")
    parts += [f"{name} {version}" for name, version in facts["versions"].items()]
    copies = "/".join(f"{facts[key]:.0f}" for key in ("h2d_pageable_gb_s", "h2d_pinned_gb_s") if key in facts)
    rate = f"gemm {facts['gemm_tflops']:.3g} TFLOP/s copy {facts['copy_gb_s']:.3g} GB/s"
    return f"{' '.join(parts)}; {rate}{f' h2d {copies} GB/s' if copies else ''} read {facts['disk_gb_s']:.2g} GB/s"
