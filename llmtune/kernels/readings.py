"""Numbers that the host reads from a device, once a step, without letting the device wait for work."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llmtune.kernels import device as ways


def reads_late(device: torch.device) -> bool:
    """Whether a step's numbers are read one step later there: a read at once would let the device run out of work."""
    return not ways.on_cpu(device)


@dataclass(frozen=True)
class _Reading:
    numbers: torch.Tensor
    copied: torch.Event | None
    take: Callable[[list[float]], None]


class Readings:
    """Hands numbers of a device to functions of the host, in order; each is one read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waiting: deque[_Reading] = deque()

    def put(self, numbers: torch.Tensor, take: Callable[[list[float]], None]) -> None:
        """Let `take` be called with the `numbers` (N) at a later `settle`; their copy to the host begins now."""
        copied = None
        if self._device.type == "cuda":
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            numbers = host.copy_(numbers, non_blocking=True)
            copied = torch.Event(device=self._device)
            copied.record()
        self._waiting.append(_Reading(numbers, copied, take))

    def settle(self, all_of_them: bool) -> None:
        """Hand over what was put, less the latest where a device reads late and not `all_of_them` are wanted."""
        kept = 0 if all_of_them or not reads_late(self._device) else 1
        while len(self._waiting) > kept:
            reading = self._waiting.popleft()
            if reading.copied is not None:
                reading.copied.synchronize()
            reading.take(reading.numbers.tolist())
