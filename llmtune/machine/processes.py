"""How the processes of one training wait for each other and agree, over gloo: no GPU spins while one works alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
PATIENCE = timedelta(days=1)
"""How long a process waits for another one that works alone: hashes, seals, downloads or fills a cache."""
_GROUPS: list[tuple[Any, Any]] = []
"""The default group of processes, and the gloo group beside it."""


def world() -> int:
    """The number of processes that train together."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    import torch.distributed as dist

    return dist.get_rank() if world() > 1 else 0


def is_first_here() -> bool:
    """Whether this process is the first one on its machine."""
    return world() == 1 or int(os.environ.get("LOCAL_RANK", "0")) == 0


def here() -> int:
    """The number of processes on this machine."""
    return 1 if world() == 1 else int(os.environ.get("LOCAL_WORLD_SIZE", str(world())))


def sharing(device: "torch.device") -> int:
    """The number of processes that share the memory of a device: of a CPU all on this machine, of a GPU one."""
    return here() if device.type == "cpu" else 1


def join() -> None:
    """Make the group over which processes wait; all must call it, and the first wait does where nobody did."""
    if world() > 1:
        _group()


def _group() -> Any:
    import torch.distributed as dist

    default = dist.group.WORLD
    if not _GROUPS or _GROUPS[0][0] is not default:
        same = dist.get_backend() == "gloo"
        _GROUPS[:] = [(default, default if same else dist.new_group(backend="gloo", timeout=PATIENCE))]
    return _GROUPS[0][1]


def wait() -> None:
    """Wait until every process is here."""
    import torch.distributed as dist

    if world() > 1:
        dist.barrier(group=_group())


@contextmanager
def ahead(first: bool) -> Iterator[None]:
    """Let the processes that are `first` run the block before the others do."""
    if not first:
        wait()
    yield
    if first:
        wait()


def gather(value: T) -> list[T]:
    """What every process gives, in each, by their numbers."""
    import torch.distributed as dist

    answers = [value] * world()
    if world() > 1:
        dist.all_gather_object(answers, value, group=_group())
    return answers


def gather_on_first(value: T) -> list[T]:
    """What every process gives, in the first one; an empty list in the others."""
    import torch.distributed as dist

    if world() == 1:
        return [value]
    answers = [value] * world() if rank() == 0 else []
    dist.gather_object(value, answers or None, dst=0, group=_group())
    return answers


def broadcast(value: T) -> T:
    """What the first process gives, in each."""
    import torch.distributed as dist

    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values, src=0, group=_group())
    return values[0]


def share(items: list[T]) -> list[T]:
    """The part of `items` that this process works on; together the processes have all of them."""
    return items[rank() :: world()]
