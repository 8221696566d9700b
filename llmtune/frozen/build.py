"""Building kept states: every row through a part of a model's blocks, in one pass or a block at a time."""

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmtune.frozen.stand_in import StubbedDecoder
from llmtune.frozen.store import OutputWriter, StoredOutputs, check_room, is_complete, make_room
from llmtune.frozen.stream import OffloadedBlocks
from llmtune.numbers import duration

SECONDS = 15.0


@dataclass(frozen=True)
class CacheEntry:
    """Where the states with these facts lie, or will."""

    folder: Path
    facts: dict[str, Any]

    def there(self) -> bool:
        """Whether something lies there."""
        return self.folder.exists()

    def whole(self) -> bool:
        """Whether it is these states, whole and unchanged."""
        return is_complete(self.folder, self.facts)

    def open(self, decoder: StubbedDecoder) -> StoredOutputs:
        """The states, which are whole."""
        return StoredOutputs(self.folder, decoder.lengths, decoder.width, decoder.dtype)


class BuildProgress:
    """Says now and then how far a building is that takes `total` tokens through blocks, and what is left of it."""

    def __init__(
        self,
        total: int,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._say, self._clock = total, say, clock
        self._began = self._told = clock()
        self._done = 0

    def add(self, tokens: int, what: str) -> None:
        """Count tokens that passed, and tell of `what` where it is time."""
        self._done += tokens
        now = self._clock()
        if now - self._told < SECONDS and not (self._done == self._total and self._told > self._began):
            return
        self._told = now
        speed = self._done / (now - self._began)
        left = duration((self._total - self._done) / speed)
        share = f"{self._done / self._total:.0%}"
        self._say(f"frozen blocks: building {what}{share}, {speed:,.0f} tokens/s, {left} left")


def run_rows(
    decoder: StubbedDecoder,
    writers: dict[int, OutputWriter],
    start: int,
    kept: StoredOutputs | None,
    pace: BuildProgress,
    what: str = "",
) -> None:
    """Every row through the blocks from `start` on, whose states are `kept`; writes the states at each boundary.

    Raises OSError where the disk fills up.
    """
    batch: list[int] = []

    def keeper(writer: OutputWriter) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
            writer.add(hidden, [decoder.lengths[row] for row in batch])

        return keep

    with ExitStack() as after:
        after.callback(decoder.arrange)
        for boundary, writer in writers.items():
            after.enter_context(decoder.blocks[boundary - 1].register_forward_hook(keeper(writer)))
        decoder.arrange(start, max(writers))
        for rows in decoder.batches():
            batch[:] = rows
            decoder.forward(rows, kept)
            pace.add(sum(decoder.lengths[row] for row in rows), what)
    for writer in writers.values():
        writer.seal()


def build_in_one_pass(
    decoder: StubbedDecoder, missing: dict[int, CacheEntry], size: int, start: int, kept: StoredOutputs | None
) -> str | None:
    """The states at the missing boundaries in one pass; gives a reason where the disk cannot take them."""
    try:
        with ExitStack() as opened:
            writers = {
                boundary: opened.enter_context(OutputWriter(place.folder, place.facts, size))
                for boundary, place in missing.items()
            }
            run_rows(decoder, writers, start, kept, BuildProgress(sum(decoder.lengths)))
    except OSError as error:  # a full or read-only disk costs the saving, not the run
        return str(error)
    return None


def build_by_block(
    decoder: StubbedDecoder, shelf: OffloadedBlocks, places: list[CacheEntry], size: int, limit: int
) -> None:
    """The states at the last of the boundaries 1, 2, ..., a block at a time, from the highest boundary that is whole.

    Two boundaries take disk at a time; raises OSError where there is no room for them.
    """
    start = max((at + 1 for at, place in enumerate(places) if place.there() and place.whole()), default=0)
    kept = places[start - 1].open(decoder) if start else None
    root, tokens = places[0].folder.parent, sum(decoder.lengths)
    check_room(root, min(2, len(places) - start) * size)
    pace = BuildProgress(tokens * (len(places) - start))
    for at in range(start, len(places)):
        near = {place.folder for place in places[max(0, at - 1) : at + 1]}
        make_room(root, size, limit, near)
        with OutputWriter(places[at].folder, places[at].facts, size) as writer, shelf.lent(at, decoder.blocks[at]):
            run_rows(decoder, {at + 1: writer}, at, kept, pace, f"block {at + 1} of {len(places)}, ")
        kept = places[at].open(decoder)
        if at > start:
            shutil.rmtree(places[at - 1].folder)
