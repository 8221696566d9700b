"""The most memory that a process took: allocated and reserved on a GPU, resident on CPUs."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Peak:
    """Bytes at the worst moment; on a GPU those of tensors and those that torch holds, on CPUs the resident set."""

    allocated: int | None = None
    reserved: int | None = None
    resident: int | None = None


def resident_bytes() -> int:
    """Bytes of this process in memory now."""
    import psutil  # type: ignore[import-untyped]

    return int(psutil.Process().memory_info().rss)


def peak(device: "torch.device") -> Peak:
    """The peak since `reset_peak`, or since the process began where the system cannot reset it."""
    import resource

    import torch

    if device.type == "cuda":
        return Peak(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
    return Peak(resident=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def reset_peak(device: "torch.device") -> None:
    """Let the peak begin anew, that of a resident set where the system is a Linux that lets a process do so."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
