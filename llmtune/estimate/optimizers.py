"""Bytes of an optimizer's states, tensor by tensor."""

import math
from collections.abc import Callable, Iterable

Shape = tuple[int, ...]
_LEAST_IN_8_BITS = 4096
"""bitsandbytes keeps the states of smaller tensors in fp32."""
_BLOCK = 256
"""Elements of an 8-bit state that share a scale in fp32."""


def _adamw(shape: Shape) -> int:
    return 8 * math.prod(shape) + 4


def _adamw_8bit(shape: Shape) -> int:
    size = math.prod(shape)
    return 8 * size if size < _LEAST_IN_8_BITS else 2 * (size + 4 * math.ceil(size / _BLOCK))


def _adafactor(shape: Shape) -> int:
    if len(shape) < 2:
        return 4 * math.prod(shape)
    return 4 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1])


def _sgd(shape: Shape) -> int:
    return 0


_BYTES: dict[str, Callable[[Shape], int]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "paged_adamw_8bit": _adamw_8bit,
    "adafactor": _adafactor,
    "sgd": _sgd,
}


def state_bytes(optimizer: str, shapes: Iterable[Shape], wide: Iterable[Shape] = ()) -> int:
    """Bytes of the states of fp32 tensors; the 8-bit optimizers keep those in `wide` in 32 bits."""
    eight_bits = _BYTES[optimizer] is _adamw_8bit
    return sum(map(_BYTES[optimizer], shapes)) + sum(map(_adamw if eight_bits else _BYTES[optimizer], wide))
