"""Work that the processes of an evaluation share out, and whose results all of them have."""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from llmtune.machine.processes import gather, rank, world
from llmtune.working import Step

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def spread(
    items: Sequence[Item],
    work: Callable[[list[Item]], list[Answer]],
    size: Callable[[Item], int],
    together: Callable[[Item], Hashable] | None = None,
) -> list[Answer]:
    """Do `work` on this process's part of the items and return everybody's results, in the items' order.

    Items of like `size` are dealt out in turn, so that each part takes about as long; those for which `together` gives
    the same stay in one part, since their work is shared. All processes must call it alike.
    """
    if world() == 1:
        return work(list(items))
    groups: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(together(item) if together else index, []).append(index)
    dealt = sorted(groups.values(), key=lambda group: (-size(items[group[0]]), group[0]))[rank() :: world()]
    mine = sorted(index for group in dealt for index in group)
    results = work([items[index] for index in mine]) if mine else []
    by_index = {index: result for part in gather(list(zip(mine, results, strict=True))) for index, result in part}
    return [by_index[index] for index in range(len(items))]


def of_all(step: Step) -> Step:
    """Return a step that counts for all processes what this one does; they are about equally fast."""
    return lambda amount=1: step(amount * world())


def total(count: int) -> int:
    """Return the sum of what each process counted."""
    return sum(gather(count))
