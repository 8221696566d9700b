"""Which of the ways to compute a device takes."""

import torch


def on_cpu(device: torch.device) -> bool:
    """Whether a device takes what is made for CPUs; a test that answers False runs on a CPU what GPUs run."""
    return device.type == "cpu"
