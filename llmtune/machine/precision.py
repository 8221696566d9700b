"""The data type in which a device computes, by the word of a recipe; and what fp16 asks of a training.

A scaled loss overflows fp16 from time to time. The gradient scaler then lowers its scale and skips the step.
"""

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.machine.device import run_device

if TYPE_CHECKING:
    import torch


def computing_dtype(precision: str, device: "torch.device | None" = None) -> "torch.dtype":
    """The data type of a run's products on a device, by default this process's.

    auto means bf16 where the device has it; else fp16 on a GPU and fp32 on a CPU.
    """
    import torch

    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if precision in named:
        return named[precision]
    if (device or run_device()).type == "cuda":
        return torch.bfloat16 if gpu_has_bf16() else torch.float16
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def gpu_has_bf16() -> bool:
    """Whether the GPU of this process computes in bf16 itself: emulated, it is slower than fp32."""
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False)


def skipped(fp16: bool, gradient_norm: float | None) -> dict[str, bool]:
    """What a step's record says where the gradient scaler of fp16 left the weights alone; nothing otherwise."""
    overflowed = fp16 and gradient_norm is not None and not math.isfinite(gradient_norm)
    return {"skipped": True} if overflowed else {}


def catch_up(scheduler: "torch.optim.lr_scheduler.LRScheduler", step: int) -> None:
    """Take the rates of `step`: Trainer leaves a scheduler behind where the step before was skipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects an optimizer's step between two of a scheduler's
        while scheduler.last_epoch < step:
            scheduler.step()


def _cpu_has_bf16() -> bool:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags
