"""Memory on CPUs: reuses what a step frees, and bounds what libraries cache for each shape."""

import contextlib
import ctypes
import mmap
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.numbers import size

if TYPE_CHECKING:
    import torch

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt."""
TUNABLES, UNCACHED = "GLIBC_TUNABLES", "glibc.malloc.tcache_count=0"
"""Read by glibc when a process starts: turns off its per-thread cache of small freed pieces.

With the cache, small objects settle beside tensors, and the space of a freed tensor no longer fits the next one.
"""
PRIMITIVES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
"""How many compiled kernels oneDNN and torch's layer over it cache; a step uses about forty, per row length."""
_CGROUP = Path("/sys/fs/cgroup")
"""Where the system tells what this process's container may use, and uses."""


def keep_freed() -> bool:
    """Make glibc keep freed memory and request it in large parts; returns False where a user's own settings stand.

    A fresh page from the system costs more than the arithmetic on it.
    """
    tuned = os.environ.get(TUNABLES, UNCACHED)
    by_user = any(name.startswith("MALLOC_") for name in os.environ) or (tuned != UNCACHED and "malloc" in tuned)
    if by_user or platform.libc_ver()[0] != "glibc":
        return False
    options = {MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**30, TOP_PAD: 2**26}
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, value) == 1 for option, value in options.items())


def bound_primitive_cache() -> None:
    """Bound the cache of compiled kernels, unless a user did; to be called before the first matrix multiplication."""
    for name, count in PRIMITIVES.items():
        os.environ.setdefault(name, count)


def release_pages(tensor: "torch.Tensor") -> None:
    """Return a tensor's pages to the system, and lose its content; freeing it would not, as its file stays mapped."""
    if tensor.device.type != "cpu" or sys.platform != "linux" or not tensor.is_contiguous():
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    size = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page - start
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def file_mappings() -> list[range]:
    """The addresses at which this process has files mapped that are no code; none where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    files = [fields for line in lines if len(fields := line.split(maxsplit=5)) == 6 and fields[5].startswith("/")]
    ends = [fields[0].split("-") for fields in files if ".so" not in Path(fields[5]).name]
    return [range(int(first, 16), int(last, 16)) for first, last in ends]


def trim_heap() -> None:
    """Return freed memory that glibc's allocator keeps to the system."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim:
        malloc_trim(0)


def free_memory() -> int:
    """Bytes of main memory that may still be allocated: free on this machine, and within its container's limit."""
    import psutil  # type: ignore[import-untyped]

    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        free = min(free, _allowed() - int((_CGROUP / "memory.current").read_text()) + _cached_files())
    return free


def _allowed() -> int:
    """Bytes that this container may use; raises OSError or ValueError where nothing limits it."""
    return int((_CGROUP / "memory.max").read_text())  # "max": no limit


def _cached_files() -> int:
    """Bytes of files that a container's memory holds only while nothing else needs them; they count as used."""
    with contextlib.suppress(OSError, ValueError):
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    return 0


def machine_memory() -> str:
    """How much memory this machine has, its container's limit by the cgroup file, and how much is free, in words."""
    import psutil

    memory = psutil.virtual_memory()
    words = f"this machine has {size(memory.total)} of memory, {size(memory.available)} of it free now"
    with contextlib.suppress(OSError, ValueError):
        allowed = _allowed()
        if allowed < memory.total:
            words += f", and this container may use {size(allowed)}"
    return words
