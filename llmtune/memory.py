"""Memory on CPUs: what a step frees is kept for the next one, and what libraries keep for each shape is bounded."""

import ctypes
import mmap
import os
import platform
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt."""
TUNABLES, UNCACHED = "GLIBC_TUNABLES", "glibc.malloc.tcache_count=0"
"""Read by glibc when a process starts: small pieces go back at once to the room that they were cut from.

Held in a cache, slivers beside tensors go to small objects, and the tensor's place does not fit the next one.
"""
PRIMITIVES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
"""How many compiled products oneDNN, and torch's layer over it, keep: a step has some forty, each length its own."""


def keep_freed() -> bool:
    """Let glibc give nothing back to the system and take it in large parts; leaves alone what a user has set.

    A fresh page costs more than the arithmetic on it.
    """
    tuned = os.environ.get(TUNABLES, UNCACHED)
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or (tuned != UNCACHED and "malloc" in tuned)
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    options = {MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**30, TOP_PAD: 2**26}
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, value) == 1 for option, value in options.items())


def bound_primitive_cache() -> None:
    """Bound how many compiled products are kept, unless a user did; to be called before the first product."""
    for name, count in PRIMITIVES.items():
        os.environ.setdefault(name, count)


def release_pages(tensor: "torch.Tensor") -> None:
    """Give back a tensor's whole pages, and lose its content: weights are mapped from one file, which stays mapped."""
    if tensor.device.type != "cpu" or sys.platform != "linux" or not tensor.is_contiguous():
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    size = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page - start
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def trim_heap() -> None:
    """Give back what freed tensors leave in the allocator, where it is glibc's."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if give_back:
        give_back(0)
