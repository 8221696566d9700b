"""How far hidden states may be from others, and what makes it show that a row takes something on from another one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import sqrt
from typing import Any

import torch
from torch import nn

from llmtune.kernels.attention import JoinError
from llmtune.kernels.rows import JoinedRows
from llmtune.model.blocks import blocks

EXACT, ROUNDED = 1e-5, 2**-6
"""How far a token's hidden states may be from the expected ones, relative in the norm: in fp32; in 16 bits."""


def tolerance(states: torch.Tensor, count: int) -> float:
    """How far states may be from these of `count` blocks; errors of rounding grow with the root of their number."""
    rounds = torch.is_autocast_enabled(states.device.type) or states.dtype != torch.float32
    return ROUNDED * sqrt(count) if rounds else EXACT


def check_states(ours: torch.Tensor, expected: torch.Tensor, most: float, what: str) -> None:
    """Raise JoinError where states (N, H) are farther from the expected ones than `most`.

    Each token counts alike: in some models, the first one has states a thousand times as large as others have.
    """
    error = float(_errors(ours, expected).square().mean().sqrt())
    if not error <= most:
        raise JoinError(f"{what} differ by {error:.1e}, relative; rounding explains {most:.1e}")


def check_copies(states: torch.Tensor) -> None:
    """Raise JoinError where the states (C, T, H) of a joined row's copies are not those of the first one.

    What depends on their place changes most tokens; how threads share the work may change the rounding of a few.
    """
    errors = torch.stack([_errors(copy, states[0]) for copy in states[1:]]).sort(dim=1).values
    error = float(errors[:, errors.shape[1] // 2].max())
    if not error <= EXACT:
        raise JoinError(f"hidden states of a row differ by {error:.1e}, relative, with its place among joined rows")


def _errors(ours: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How far the states of each token are from the expected ones, relative."""
    smallest = torch.finfo(torch.float32).tiny
    return (ours.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1).clamp_min(smallest)


def check_rows(
    ours: torch.Tensor, expected: torch.Tensor, rows: JoinedRows, windows: Sequence[int], most: float, what: str
) -> None:
    """Raise JoinError where states (1, N, H) of joined rows differ: all, or those beyond a window, which may be few."""
    positions = rows.positions()[0, :-1]
    for first in (0, *windows):
        beyond = positions >= first
        check_states(ours[0, :-1][beyond], expected[0, :-1][beyond], most, what)


@contextmanager
def features_reversed(model: nn.Module, count: int) -> Iterator[None]:
    """Let every block be given the first `count` tokens of a joined row with their features in reverse.

    What another row then takes on, as through a convolution or a state, may be too small to tell from rounding else.
    """

    def reverse(block: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
        hidden = arguments[0] if arguments else options["hidden_states"]
        changed = torch.cat([hidden[..., :count, :].flip(-1), hidden[..., count:, :]], dim=-2)
        return ((changed, *arguments[1:]), options) if arguments else ((), {**options, "hidden_states": changed})

    hooks = [block.register_forward_pre_hook(reverse, with_kwargs=True) for block in blocks(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
