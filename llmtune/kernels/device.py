"""Which of the ways to compute a device takes, and in which precision."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch

_ON_META: ContextVar[torch.dtype | None] = ContextVar("precision on the meta device", default=None)
"""torch's own autocast passes tensors without content by."""


def on_cpu(device: torch.device) -> bool:
    """Whether a device takes what is made for CPUs; a test that answers False runs on a CPU what GPUs run."""
    return device.type == "cpu"


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The precision that autocast lowers to on a device, None where it is off."""
    if device.type == "meta":
        return _ON_META.get()
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Compute in the precision that comes."""
    return autocast_on_meta(None) if device.type == "meta" else torch.autocast(device.type, enabled=False)


@contextmanager
def autocast_on_meta(dtype: torch.dtype | None) -> Iterator[None]:
    """Let `autocast_dtype` answer so for the meta device."""
    token = _ON_META.set(dtype)
    try:
        yield
    finally:
        _ON_META.reset(token)
