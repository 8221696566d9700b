"""16-bit copies of the weights that train on CPUs: one cast a step serves every pass, forward and backward."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

_ALIGNMENT = 32
"""Numbers of 16 bits in a cache line: each copy begins at one, as a tensor of its own would."""


@dataclass
class _Copy:
    low: torch.Tensor
    state: tuple[int, int] | None = None
    """The weight's version and address when it was cast; None where it must be cast."""


class WeightCopies:
    """A bf16 copy of each trained weight of some linear layers, cast when a step first needs it.

    A step's update need not tell of itself: fused AdamW raises no version. What changes a weight within a step must
    change it in place, or give it other memory.
    """

    def __init__(self) -> None:
        self._layers: list[nn.Linear] = []
        self._weights: dict[int, torch.Tensor] = {}
        self._copies: dict[int, _Copy] = {}

    def watch(self, layers: Iterable[nn.Linear]) -> None:
        """Copy the weights of these layers too, while they train."""
        self._layers += layers

    def begin_step(self) -> None:
        """Have every weight cast anew, and give memory back where others require a gradient than before."""
        weights = {id(layer.weight): layer.weight for layer in self._layers if layer.weight.requires_grad}
        if weights.keys() != self._weights.keys():
            self.drop()
            self._weights = weights
        for copy in self._copies.values():
            copy.state = None

    def drop(self) -> None:
        """Let the memory go."""
        self._weights, self._copies = {}, {}

    def get(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """The copy of a weight as it is now; None where none is kept in `dtype`."""
        if dtype != torch.bfloat16 or id(weight) not in self._weights:
            return None
        if not self._copies:
            self._copies = _allocate(self._weights.values())
        copy = self._copies[id(weight)]
        state = weight._version, weight.data_ptr()
        if copy.state != state:
            copy.low.copy_(weight.detach())
            copy.state = state
        return copy.low


def _allocate(weights: Iterable[torch.Tensor]) -> dict[int, _Copy]:
    """Copies without content, in one piece of memory, of which the system gives what is written."""
    chosen = list(weights)
    sizes = [-(-weight.numel() // _ALIGNMENT) * _ALIGNMENT for weight in chosen]
    parts = torch.split(torch.empty(sum(sizes), dtype=torch.bfloat16), sizes)
    lows = (part[: weight.numel()].view(weight.shape) for part, weight in zip(parts, chosen, strict=True))
    return {id(weight): _Copy(low) for weight, low in zip(chosen, lows, strict=True)}
