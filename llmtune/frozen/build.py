"""Fills the cache: runs every row through some of a model's blocks, in one pass or one block at a time."""

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers

from llmtune.files import digest_of
from llmtune.frozen.reader import OutputReader
from llmtune.frozen.stand_in import StubbedDecoder, StubError
from llmtune.frozen.store import (
    OutputWriter,
    StoredOutputs,
    check_room,
    entry_name,
    is_complete,
    make_room,
    write_outputs,
)
from llmtune.frozen.stream import OffloadedBlocks
from llmtune.machine import processes
from llmtune.numbers import duration
from llmtune.working import working

INTERVAL = 10.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True)
class CacheEntry:
    """The folder for the outputs at one boundary, named after the facts that they depend on."""

    folder: Path
    facts: dict[str, object]

    def exists(self) -> bool:
        """Whether the folder is there, complete or damaged."""
        return self.folder.exists()

    def is_complete(self) -> bool:
        """Whether the folder holds exactly these outputs, complete and unchanged."""
        return is_complete(self.folder, self.facts)

    def open(self, decoder: StubbedDecoder) -> OutputReader:
        """The outputs, which are complete."""
        stored = StoredOutputs(self.folder, decoder.lengths, decoder.width, decoder.dtype)
        return OutputReader(stored, decoder.device)


def make_entry(folder: Path, decoder: StubbedDecoder, boundary: int, facts: Mapping[str, object]) -> CacheEntry:
    """The entry in `folder` of a boundary's outputs; its facts, plain values, are all that the outputs depend on.

    `facts` are those that are not of the model.
    """
    named = [block.named_parameters() for block in decoder.blocks[:boundary]]
    inside = {f"{index}.{name}": tensor for index, tensors in enumerate(named) for name, tensor in tensors}
    complete = {
        **facts,
        "attention": decoder.inner.config._attn_implementation,
        "boundary": boundary,
        "device": next(iter(inside.values())).device.type,
        **({"sharded": True} if decoder.sharded else {}),
        "dtype": str(decoder.dtype),
        "versions": [torch.__version__, transformers.__version__],
        # By name: which layers are quantized, or kept in fp32, depends on what trains in later stages.
        "weights": digest_of({name: str(tensor.dtype) for name, tensor in inside.items()}),
        "width": decoder.width,
    }
    return CacheEntry(folder / entry_name(complete), complete)


def find_complete(entries: dict[int, CacheEntry]) -> tuple[set[int], set[int]]:
    """The boundaries that have an entry, and those whose entry is complete, on every machine.

    The first process on each machine hashes them, and no other one.
    """
    existing = {boundary for boundary, entry in entries.items() if entry.exists()}
    mine = None
    if processes.is_first_here():
        with working("checking the cached outputs", len(existing), "boundaries") as step:
            mine = set[int]()
            for boundary in existing:
                mine |= {boundary} if entries[boundary].is_complete() else set()
                step()
    answers = processes.gather((existing, mine))
    complete = set.intersection(*(one for _, one in answers if one is not None))
    return set().union(*(seen for seen, _ in answers)), complete


def _say(line: str) -> None:
    print(line, flush=True)


def _silent(line: str) -> None:
    """Print nothing: another process does."""


class BuildProgress:
    """Prints from time to time how many of `total` tokens have passed through blocks, how fast, and the time left."""

    def __init__(
        self,
        total: int,
        say: Callable[[str], None] = _say,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._say, self._clock = total, say, clock
        self._start = self._last_line = clock()
        self._done = 0

    def add(self, tokens: int, part: str) -> None:
        """Count tokens that passed; prints a line that names the `part` where the last line is long enough ago."""
        self._done += tokens
        now = self._clock()
        if now - self._last_line < INTERVAL and not (self._done == self._total and self._last_line > self._start):
            return
        self._last_line = now
        speed = self._done / (now - self._start)
        left = duration((self._total - self._done) / speed)
        share = f"{self._done / self._total:.0%}"
        self._say(f"frozen blocks: filling the cache, {part}{share}, {speed:,.0f} tokens/s, {left} left")


def run_rows(
    decoder: StubbedDecoder,
    writers: Mapping[int, OutputWriter | None],
    start: int,
    stored: OutputReader | None,
    progress: BuildProgress,
    part: str = "",
) -> None:
    """Run every row through the blocks from `start` on, whose inputs are `stored`; write the outputs at each boundary.

    Raises OSError where the disk fills up; of a sharded model after the last row, as others wait in each pass.
    Raises StubError for a model whose blocks need what stubs do not return.
    """
    failures: list[OSError] = []

    def write(writer: OutputWriter, lengths: list[int], outputs: torch.Tensor) -> None:
        try:
            if not failures:
                writer.add(outputs, lengths)
        except OSError as error:
            if not decoder.sharded:
                raise
            failures.append(error)

    with decoder.stubbed():
        decoder.stub(start, max(writers))
        for rows in decoder.batches():
            lengths = [decoder.lengths[row] for row in rows]
            takers = {boundary: partial(write, writer, lengths) for boundary, writer in writers.items() if writer}
            decoder.forward(rows, stored, takers)
            progress.add(sum(lengths), part)
    if failures:
        raise failures[0]


def build_in_one_pass(
    decoder: StubbedDecoder, missing: dict[int, CacheEntry], size: int, start: int, stored: OutputReader | None
) -> str | None:
    """Write the outputs at the missing boundaries in one pass; returns the reason where disk or model cannot do it.

    The first process on each machine writes; of a sharded model, every process must run the pass.
    """
    first, reason = processes.is_first_here(), None
    writers: dict[int, OutputWriter | None] = dict.fromkeys(missing)
    try:
        with ExitStack() as folders:
            try:
                for boundary, entry in missing.items() if first else ():
                    writers[boundary] = folders.enter_context(write_outputs(entry.folder, entry.facts, size))
            except OSError as error:  # a full or read-only disk costs the saving, not the run
                reason = str(error)
            if decoder.sharded:
                reason = next(filter(None, processes.gather(reason)), None)
            if reason:
                raise OSError(reason)
            run_rows(decoder, writers, start, stored, BuildProgress(sum(decoder.lengths), _say if first else _silent))
    except (OSError, StubError) as error:
        return str(error)
    return None


def build_by_block(
    decoder: StubbedDecoder, offloaded: OffloadedBlocks, entries: list[CacheEntry], size: int, limit: int
) -> None:
    """Write the outputs at boundaries 1, 2, ..., each from the one before; starts at the highest complete one.

    Two boundaries are on disk at a time and the last one stays; raises OSError where there is no room for them.
    """
    start = max((index + 1 for index, entry in enumerate(entries) if entry.exists() and entry.is_complete()), default=0)
    stored = entries[start - 1].open(decoder) if start else None
    root, tokens = entries[0].folder.parent, sum(decoder.lengths)
    check_room(root, min(2, len(entries) - start) * size)
    progress = BuildProgress(tokens * (len(entries) - start))
    for index in range(start, len(entries)):
        entry, part = entries[index], f"block {index + 1} of {len(entries)}, "
        make_room(root, size, limit, {near.folder for near in entries[max(0, index - 1) : index + 1]})
        with write_outputs(entry.folder, entry.facts, size) as writer, offloaded.loaded(index, decoder.blocks[index]):
            run_rows(decoder, {index + 1: writer}, index, stored, progress, part)
        stored = entry.open(decoder)
        if index > start:
            shutil.rmtree(entries[index - 1].folder)
