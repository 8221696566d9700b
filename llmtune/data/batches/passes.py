"""How the rows of an optimizer step are split: into passes that fit into memory, each dealt to all processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

DEFAULT_ROWS = 8
"""The most rows of a pass on CPUs, where a recipe names no limit."""


@dataclass(frozen=True)
class PassLimits:
    """The most that one process takes in one forward and backward pass; None is no limit."""

    rows: int | None = None
    tokens: int | None = None
    """Padding included: rows times the longest one. A longer row is a pass of its own."""


def rows_per_pass(share: int, named: int | None, on_cpu: bool) -> int | None:
    """The most rows of a pass for a process with `share` rows a step: the one `named`, else a default on CPUs."""
    if named is not None or not on_cpu:
        return named
    return max(size for size in range(1, min(DEFAULT_ROWS, share) + 1) if share % size == 0)


def split(lengths: Sequence[int], limits: PassLimits, world: int = 1) -> list[list[list[int]]]:
    """The passes of rows of these lengths (tokens): per pass and process, the places of its rows in `lengths`.

    Every process has every pass, though maybe no row in the last one: processes that share a model run it together.
    """
    return [_deal(group, lengths, world, turn) for turn, group in enumerate(_groups(lengths, limits, world))]


def _groups(lengths: Sequence[int], limits: PassLimits, world: int) -> list[list[int]]:
    """The rows of each pass over all processes: as they come where that fits, else those of like length together."""
    rows = list(range(len(lengths)))
    most = limits.rows or max(1, ceil(len(rows) / world))
    as_they_come = [rows[start : start + most * world] for start in range(0, len(rows), most * world)]
    tokens = limits.tokens
    if tokens is None or all(_fits(group, lengths, tokens, world) for group in as_they_come):
        return as_they_come
    by_length = sorted(rows, key=lambda row: -lengths[row])
    groups = []
    while by_length:
        size = world * max(1, min(most, tokens // lengths[by_length[0]]))
        groups.append(by_length[:size])
        by_length = by_length[size:]
    return groups


def _fits(group: list[int], lengths: Sequence[int], tokens: int, world: int) -> bool:
    each = ceil(len(group) / world)
    return each == 1 or each * max(lengths[row] for row in group) <= tokens


def _deal(group: list[int], lengths: Sequence[int], world: int, turn: int) -> list[list[int]]:
    """Each process's rows of a group, so that all have about as many tokens; `turn` changes who has the longest."""
    if world == 1:
        return [group]
    shares: list[list[int]] = [[] for _ in range(world)]
    for place, row in enumerate(sorted(group, key=lambda row: -lengths[row])):
        at = place % (2 * world)
        shares[(min(at, 2 * world - 1 - at) + turn) % world].append(row)
    return shares
