"""The device on which this process computes, and what is free on it: the one place that looks for a GPU."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from llmtune.machine.memory import free_memory

if TYPE_CHECKING:
    import torch


def told_to_use_cpu(environment: Mapping[str, str]) -> bool:
    """Whether the launcher told a process of this environment to use the CPU."""
    return environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")


def run_device(cpu: bool = False) -> "torch.device":
    """The GPU of this process, or the CPU where there is none, `cpu` is given or the launcher was told so."""
    import torch

    if cpu or told_to_use_cpu(os.environ) or not torch.cuda.is_available():
        return torch.device("cpu")
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    # Before CUDA starts no process has chosen another GPU, and asking would start it.
    return torch.device("cuda", torch.cuda.current_device() if started else 0)


def free_bytes(device: "torch.device") -> int:
    """Bytes that may still be allocated on a device: free memory of the GPU, or of this machine or container."""
    import torch

    if device.type == "cuda":
        # What torch keeps for its next tensors is not free for others, but for this process.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return free_memory()


def release_cached(device: "torch.device") -> None:
    """Give back the memory of a GPU that torch keeps for its next tensors; nothing happens for a CPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()


def forked_rng(*devices: "torch.device") -> AbstractContextManager[None]:
    """Restore the random state of the CPU and of these devices after the block; other GPUs are left alone."""
    import torch

    gpus = [device for device in devices if device.type == "cuda"]
    context: AbstractContextManager[None] = torch.random.fork_rng(devices=gpus)
    return context
