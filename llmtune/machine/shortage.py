"""What was asked of a full memory, and what is free there, in words."""

import contextlib
import re

from llmtune.errors import LONGEST_LINE, first_line
from llmtune.machine.memory import machine_memory
from llmtune.numbers import size

_ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) ?(bytes|[KMGT]iB)", re.IGNORECASE)
_FREE = re.compile(r"capacity of ([\d.]+) ?([KMGT]iB) of which ([\d.]+) ?(bytes|[KMGT]iB) is free")
_GPU = re.compile(r"\bGPU (\d+)")
_ON_GPU = re.compile(r"CUDA|CUBLAS|CUDNN|CUSOLVER|CUSPARSE|NCCL|\bHIP\b|\bGPU\b", re.IGNORECASE)
_POWERS = {"bytes": 0, "KiB": 1, "MiB": 2, "GiB": 3, "TiB": 4}


def shortage(error: BaseException) -> str:
    """Say what an error that means a full memory asked for, and what is free on the GPU or on this machine."""
    text = str(error)
    asked = _ASKED.search(text)
    words = f"{size(_bytes(*asked.groups()))} was asked for" if asked else first_line(error)[:LONGEST_LINE]
    if _ON_GPU.search(text):
        number, free = _GPU.search(text), _free_on_gpu(text)
        place = f" on GPU {number[1]}" if number else " on the GPU"
        return f"out of memory{place}: {words}{f', and {free} is free' if free else ''}"
    return f"out of memory: {words}; {machine_memory()}"


def _free_on_gpu(text: str) -> str:
    """What is free on the GPU, as the error says it or as the GPU does now; empty where neither does."""
    told = _FREE.search(text)
    if told:
        return f"{size(_bytes(told[3], told[4]))} of {size(_bytes(told[1], told[2]))}"
    with contextlib.suppress(Exception):  # a GPU that failed may not answer
        from llmtune.machine.device import free_bytes, run_device

        device = run_device()
        if device.type != "cpu":
            return size(free_bytes(device))
    return ""


def _bytes(number: str, unit: str) -> float:
    return float(number) * 1024 ** _POWERS[unit if unit == "bytes" else unit[0].upper() + "iB"]
