"""The most memory that a process took: allocated and reserved on a GPU, resident on CPUs."""

from dataclasses import dataclass
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
    """The peak since the process began, on a GPU since `reset_peak`."""
    import resource

    import torch

    if device.type == "cuda":
        return Peak(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
    return Peak(resident=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def reset_peak(device: "torch.device") -> None:
    """Let a GPU's peak begin anew; the peak of a resident set cannot."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
