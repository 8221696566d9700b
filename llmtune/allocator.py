"""Memory that a step frees is kept for the next one: a fresh page costs more than the arithmetic on it."""

import ctypes
import os
import platform

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt."""


def keep_freed() -> bool:
    """Let glibc give nothing back to the system and take it in large parts; leaves alone what a user has set."""
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    options = {MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**30, TOP_PAD: 2**26}
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, value) == 1 for option, value in options.items())
