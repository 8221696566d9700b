"""Tells which tensors of a model changed, by a number for each, without keeping a copy."""

import torch
from torch import nn

from llmtune.working import working

_PIECE = 2**20
"""Bytes that are read at a time."""
_SEED = 20_240_229


def digests(weights: nn.Module, dtype: torch.dtype, name: str) -> dict[str, int]:
    """Return a 64-bit number for the bytes of every parameter as they are stored in `dtype`.

    Each 8 bytes are multiplied by a number of their own, modulo 2^64: fast, and no shield against forgery.
    """
    factors = _factors()
    parameters = dict(weights.named_parameters())
    numbers = {}
    with working(f"hashing the tensors of {name}", len(parameters), "tensors") as step:
        for key, tensor in parameters.items():
            numbers[key] = _digest(tensor.detach(), dtype, factors)
            step()
    return numbers


def _factors() -> torch.Tensor:
    """Return the odd factors of a piece's words, the same in every process."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(-(2**63), 2**63 - 1, (_PIECE // 8,), generator=generator) | 1


def _digest(tensor: torch.Tensor, dtype: torch.dtype, factors: torch.Tensor) -> int:
    total = tensor.numel()
    for piece in torch.split(tensor.reshape(-1), _PIECE // dtype.itemsize):
        content = piece.to(dtype).view(torch.uint8)
        words = nn.functional.pad(content, (0, -len(content) % 8)).view(torch.int64)
        total = (total * int(factors[0]) + int(torch.dot(words, factors[: len(words)]))) % 2**64
    return total
