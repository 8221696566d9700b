"""The GPUs of this machine: how many torch can use, why it cannot use others, and what is free on them."""

import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtune.machine.device import told_to_use_cpu
from llmtune.numbers import size

VISIBLE = "CUDA_VISIBLE_DEVICES"
HIP_VISIBLE = "HIP_VISIBLE_DEVICES"
_FILES = ("nvidia[0-9]*", "kfd", "dxg")  # CUDA, ROCm, CUDA on Windows
_DRIVER = Path("/proc/driver/nvidia/version")
_INSTALL = "https://pytorch.org/get-started/locally names the builds"
_CROWDED = 0.85
"""The share of a GPU's memory that is free where nothing but a desktop uses it."""


@dataclass(frozen=True)
class Gpus:
    """How many GPUs torch can use, and in words why not those beyond them; empty where it can use all."""

    count: int
    fault: str = ""


@dataclass(frozen=True)
class Card:
    """The GPU of one process: its name, its memory and how much of it is free, in bytes, and the run's data type."""

    name: str
    total: int
    free: int
    dtype: str = ""


def count_gpus(devices: Path = Path("/dev")) -> int:
    """Count the GPUs that torch can use; torch is imported only where a GPU has a device file."""
    return find_gpus(devices).count


def find_gpus(devices: Path = Path("/dev"), driver: Path = _DRIVER) -> Gpus:
    """The GPUs that torch can use, and why it cannot use those of NVIDIA that have a device file."""
    files = [file for pattern in _FILES for file in devices.glob(pattern)]
    if not files:
        return Gpus(0)
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of an old driver in three lines
        # NVML counts GPUs that an old driver keeps from torch.
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # dxg is there under Windows whatever the GPU is.
    present = any(file.name.startswith("nvidia") for file in files) or (not count and bool(shutil.which("nvidia-smi")))
    return Gpus(count, _fault(count, os.environ.get(VISIBLE), driver) if present else "")


def _fault(count: int, visible: str | None, driver: Path) -> str:
    """Why torch uses fewer GPUs than are there, or than are named; empty where it does not."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA, and this machine has a GPU; {_INSTALL} with CUDA"
    if visible is not None:
        named = len(_named(visible))
        if count < named:
            return f"{VISIBLE}={visible} names a GPU that is not there; `nvidia-smi -L` lists those that are"
        return "" if count else f"{VISIBLE} is {visible!r}, which hides every GPU; unset it"
    if count:
        return ""
    needs = f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and finds no GPU that it can use"
    version = driver_version(driver)
    if not version:
        return f"{needs}: the NVIDIA driver does not answer; `nvidia-smi` says why"
    return (
        f"{needs} with the NVIDIA driver {version}; update the driver, or install a build for an older CUDA: {_INSTALL}"
    )


def _named(visible: str) -> list[str]:
    """The GPUs that a list names; as CUDA reads it, -1 ends the list."""
    names: list[str] = []
    for name in visible.split(","):
        if not name.strip() or name.strip().startswith("-"):
            break
        names.append(name.strip())
    return names


def smallest_gpu() -> int:
    """Bytes of memory of the smallest GPU that torch can use; it is not to be asked where there is none."""
    import torch

    return min(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))


def first_gpu(visible: str | None) -> str:
    """The first GPU of a list as in CUDA_VISIBLE_DEVICES; number 0 where there is no list."""
    return "0" if visible is None else visible.split(",")[0].strip()


def name_gpus(count: int, environment: Mapping[str, str]) -> list[str]:
    """The GPUs that torch can use, by the names that a child's list has: the environment's own, or numbers."""
    listed = environment.get(_variable(environment))
    return [str(number) for number in range(count)] if listed is None else _named(listed)[:count]


def visibility(names: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """What a child sees of the GPUs: these alone."""
    return {_variable(environment): ",".join(names)}


def _variable(environment: Mapping[str, str]) -> str:
    """The variable that lists visible GPUs: ROCm's own, where it is set, goes before CUDA's."""
    return HIP_VISIBLE if HIP_VISIBLE in environment else VISIBLE


def driver_version(file: Path = _DRIVER) -> str:
    """The version of the NVIDIA driver; empty where neither the system nor nvidia-smi tells it."""
    if file.is_file():
        match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", file.read_text(encoding="utf-8", errors="replace"))
        return match[1] if match else ""
    command = shutil.which("nvidia-smi")
    if not command:
        return ""
    words = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer[0] if answer and re.fullmatch(r"[\d.]+", answer[0]) else ""


def lacks_kernels(name: str, capability: tuple[int, int], built: Sequence[str]) -> str:
    """Why a torch build has no kernels for a GPU, in words; empty where it has.

    `built` are its targets, such as sm_80 or compute_90: code for sm_80 runs on 8.x from 8.0 on, compute_90 on all
    from 9.0 on.
    """
    targets = [match.groups() for target in built if (match := re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", target))]
    own = [(kind, (int(major), int(minor))) for kind, major, minor in targets]
    runs = [target <= capability and (kind == "compute" or target[0] == capability[0]) for kind, target in own]
    if any(runs) or not own:
        return ""
    number = f"sm_{capability[0]}{capability[1]}"
    return (
        f"this torch build has no code for {name} ({number}), only for {', '.join(built)}; {_INSTALL} for other CUDAs"
    )


def card_notes(cards: Sequence[Card]) -> list[str]:
    """A line where GPUs differ in size, and one where others use much of one; empty for equal GPUs that are free."""
    notes = []
    smallest, largest = min(card.total for card in cards), max(card.total for card in cards)
    if smallest < 0.95 * largest:
        sizes = ", ".join(f"{card.name} {size(card.total)}" for card in cards)
        notes.append(f"the GPUs differ ({sizes}): the smallest decides what fits, the slowest how long a step takes")
    for number, card in enumerate(cards):
        if card.free < _CROWDED * card.total:
            used = f"{size(card.total - card.free)} of {size(card.total)}"
            notes.append(f"GPU {number} ({card.name}): {used} is in use by other programs; `nvidia-smi` names them")
    return notes


def show_gpus(environment: Mapping[str, str]) -> dict[str, str]:
    """What a process that was launched by hand should see: no GPU where it is to use the CPU, one where it is alone."""
    if told_to_use_cpu(environment):
        return {VISIBLE: ""}
    return {VISIBLE: first_gpu(environment.get(VISIBLE))} if environment.get("WORLD_SIZE", "1") == "1" else {}
