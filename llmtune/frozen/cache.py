"""Frozen blocks run once per row.

llmtune caches the output of the last frozen block on disk, reuses it across epochs, stages and runs on the same base
and data, and frees those blocks' weights. Before step 1 it checks on three rows that the cached path and the full model
agree. The *boundary* of a stage is the number of blocks below the lowest one that trains. In training, stubs return the
cached output in their place; masks and rotary embeddings still come from the model's own forward.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmtune.errors import FieldError, MachineError, TrainingError
from llmtune.frozen.boundary import Span, choose_boundaries, find_randomness
from llmtune.frozen.build import CacheEntry, build_by_block, build_in_one_pass, find_complete, make_entry
from llmtune.frozen.check import find_slower, measure_errors
from llmtune.frozen.reader import OutputReader, keep_in_memory
from llmtune.frozen.stand_in import Join, Rearrange, StubbedDecoder, StubError
from llmtune.frozen.store import digest_of_rows, make_room
from llmtune.frozen.stream import KEY, OffloadedBlocks, too_low_limit
from llmtune.frozen.weights import free_weights
from llmtune.machine import processes
from llmtune.numbers import size as number_of_bytes

NOT_WORTH_IT = "not cached; this run is too short for caching to save time"


@dataclass(frozen=True)
class CachePolicy:
    """What may be cached, and where; outputs with the same facts are shared between runs."""

    folder: Path
    facts: dict[str, object]
    """The base and its precision."""
    adapter: dict[str, object] | None
    """The adapter's settings, which count where it changes frozen blocks."""
    limit: int
    """The most bytes that the folder may take."""
    always: bool
    """Whether to cache even where that saves no time."""
    offloaded: OffloadedBlocks | None = None
    """Blocks that are not in memory, so that the output of their last one must be cached."""


class FrozenBlocks:
    """Caches, returns and checks the outputs of the blocks below a stage's `boundary`, for rows of token ids."""

    def __init__(self, rows: Sequence[list[int]], policy: CachePolicy) -> None:
        self._rows, self._policy = rows, policy
        self._decoder: StubbedDecoder | None = None
        self._outputs: dict[int, OutputReader] = {}
        self._freed = False

    @property
    def boundary(self) -> int:
        """The number of blocks that cached outputs stand in for now."""
        return self._decoder.cached if self._decoder else 0

    @property
    def kept(self) -> list[int]:
        """The boundaries whose outputs are cached."""
        return sorted(self._outputs)

    def begin(
        self,
        model: nn.Module,
        spans: list[Span],
        distance: dict[str, int],
        autocast: Callable[[], AbstractContextManager[object]],
        before: list[int] | None = None,
        join: Join | None = None,
    ) -> str | None:
        """Cache what saves time in the coming `spans`; returns one line on it, None where no block is frozen.

        A resumed run uses the boundaries `before`: its result stays the same. Raises RecipeError, MachineError or
        TrainingError where offloaded blocks cannot be replaced by their output.
        """
        if not (useful := sorted({span.boundary for span in spans if span.boundary})):
            return None
        offloaded = self._policy.offloaded
        decoder = self._decoder = StubbedDecoder(model, self._rows, autocast)
        with offloaded.loading_on_demand(decoder.blocks) if offloaded else nullcontext():
            reason = find_randomness(decoder.inner, decoder.blocks[useful[-1] :]) or decoder.inspect(useful)
            if reason and offloaded:
                raise FieldError(KEY, f"stream does not work here: {reason}; try auto")
            if reason:
                return f"frozen blocks: not cached; {reason}"
            decoder.join = None if offloaded or decoder.sharded else join
            entries = {boundary: self._entry(decoder, boundary, distance) for boundary in useful}
            notes = self._fill(decoder, spans, entries, before)
        return f"frozen blocks: {'; '.join([*notes, *self._free_weights(decoder, spans)])}"

    def _fill(
        self, decoder: StubbedDecoder, spans: list[Span], entries: dict[int, CacheEntry], before: list[int] | None
    ) -> list[str]:
        """Open, build and check the outputs that are worth it at these boundaries; returns what was done, in words."""
        policy = self._policy
        existing, complete = find_complete(entries)
        size = sum(decoder.lengths) * decoder.width * decoder.dtype.itemsize
        notes = []
        if damaged := len(existing - complete):
            notes.append(f"{damaged} damaged or foreign cache {'entry' if damaged == 1 else 'entries'} not used")
        streamed = set()
        if policy.offloaded and min(entries) not in complete:
            streamed = self._stream(decoder, policy.offloaded, size)
        at_hand = complete | streamed
        chosen = set(choose_boundaries(spans, at_hand, len(self._rows), size, policy.limit, policy.always))
        if before is not None:
            chosen = set(entries) & {*before, *streamed}
        for boundary in chosen & at_hand:
            self._outputs[boundary] = entries[boundary].open(decoder)
        missing = {boundary: entries[boundary] for boundary in sorted(chosen - at_hand)}
        if missing:
            if processes.is_first_here():
                make_room(policy.folder, size * len(missing), policy.limit, {entries[b].folder for b in chosen})
            notes += self._build(decoder, missing, size)
        keep_in_memory([self._outputs[boundary] for boundary in reversed(self.kept)])
        notes += self._check(decoder)
        if not (policy.always or policy.offloaded or before is not None):
            slower = find_slower(decoder, self._outputs)
            self._outputs = {boundary: reader for boundary, reader in self._outputs.items() if boundary not in slower}
            notes += slower.values()
        return _summary(set(self.kept) - complete, set(self.kept) & complete, size, policy, notes)

    def _build(self, decoder: StubbedDecoder, missing: dict[int, CacheEntry], size: int) -> list[str]:
        """Build and open the missing outputs; returns a note where a disk cannot take them."""
        start, reason = self._highest(min(missing)), None
        if decoder.sharded or processes.is_first_here():
            reason = build_in_one_pass(decoder, missing, size, start, self._outputs.get(start))
        reason = next(filter(None, processes.gather(reason)), None)
        if reason:
            return [f"not cached: {reason}"]
        self._outputs |= {boundary: entry.open(decoder) for boundary, entry in missing.items()}
        return []

    def _stream(self, decoder: StubbedDecoder, offloaded: OffloadedBlocks, size: int) -> set[int]:
        """Build the outputs of the last offloaded block, block by block; raises MachineError where disk lacks."""
        needed = size * min(2, offloaded.count)
        if needed > self._policy.limit:
            raise too_low_limit(needed, MachineError)
        entries = [self._entry(decoder, boundary, {}) for boundary in range(1, offloaded.count + 1)]
        try:
            build_by_block(decoder, offloaded, entries, size, self._policy.limit)
        except OSError as error:
            raise FieldError(KEY, f"stream needs disk: {error}", MachineError) from error
        except StubError as error:
            raise FieldError(KEY, f"stream does not work here: {error}; try auto") from error
        return {offloaded.count}

    def _check(self, decoder: StubbedDecoder) -> list[str]:
        """Drop outputs that differ from the full model's; raises TrainingError where blocks need them to be right."""
        notes, offloaded = [], self._policy.offloaded
        answers = processes.gather(measure_errors(decoder, self._outputs, streamed=offloaded is not None))
        # The same in each process, as must be what they use.
        allowed = min(bound for _, bound in answers)
        errors = {boundary: max(mine[boundary] for mine, _ in answers) for boundary in self._outputs}
        for boundary in (boundary for boundary, error in errors.items() if not error <= allowed):
            line = f"outputs of block {boundary} differ from the full model's by {errors[boundary]:.1e}"
            if offloaded and boundary == offloaded.count:
                raise FieldError(KEY, f"stream does not work with this model: {line}; try auto", TrainingError)
            del self._outputs[boundary]
            notes.append(f"{line}: not used")
        return notes

    def _free_weights(self, decoder: StubbedDecoder, spans: list[Span]) -> list[str]:
        """Free the weights of blocks that no coming stage runs; the result is made of what trained, not of them."""
        floor = min(span.boundary for span in spans)
        if floor not in self._outputs:
            return []
        self._freed = True
        freed = free_weights(decoder.blocks, floor)
        return [f"{number_of_bytes(freed)} of weights freed"] if freed else []

    def enter(self, boundary: int) -> None:
        """Stub the blocks below a boundary, as far up as their outputs are cached; every other block computes."""
        if self._decoder:
            self._decoder.stub(self._highest(boundary + 1))

    def end(self) -> None:
        """Let every block compute again, unless weights were freed."""
        if not self._freed:
            self.enter(0)

    def select(
        self, rows: Sequence[int], tokens: int, device: torch.device, rearrange: Rearrange | None = None
    ) -> None:
        """Choose the rows of the next forward pass, padded to `tokens` and rearranged by `rearrange`."""
        if self.boundary and self._decoder:
            self._decoder.set_cached(self._outputs[self.boundary], rows, tokens, device, rearrange)

    def expect(self, rows: Sequence[int]) -> None:
        """Read the outputs of these rows ahead: their batch was made, and comes after those that were made before."""
        if self.boundary:
            self._outputs[self.boundary].expect(rows)

    def expecting(self, collate: Callable[[list[dict[str, Any]]], Any]) -> Callable[[list[dict[str, Any]]], Any]:
        """A function that makes batches as `collate` does, and has the outputs of their rows read ahead."""

        def collate_and_expect(rows: list[dict[str, Any]]) -> Any:
            if all("index" in row for row in rows):
                self.expect([row["index"] for row in rows])
            return collate(rows)

        return collate_and_expect

    def _highest(self, limit: int) -> int:
        """The highest cached boundary below `limit`, 0 where there is none."""
        return max((boundary for boundary in self._outputs if boundary < limit), default=0)

    def _entry(self, decoder: StubbedDecoder, boundary: int, distance: dict[str, int]) -> CacheEntry:
        """The cache entry of a boundary."""
        adapted = any(len(decoder.blocks) - far < boundary for far in distance.values()) and self._policy.adapter
        facts = {**self._policy.facts, "adapter": adapted or None, "rows": self._rows_digest}
        return make_entry(self._policy.folder, decoder, boundary, facts)

    @cached_property
    def _rows_digest(self) -> str:
        return digest_of_rows(self._rows)


def _summary(built: set[int], reused: set[int], size: int, policy: CachePolicy, notes: list[str]) -> list[str]:
    """What was cached, in words: the boundaries that were built and reused, each `size` bytes, and the notes."""
    for verb, boundaries in (("cached", built), ("reused", reused)):
        if boundaries:
            listed = ", ".join(map(str, sorted(boundaries)))
            notes = [f"{verb} below block {listed} ({number_of_bytes(len(boundaries) * size)})", *notes]
    if policy.offloaded:
        return [*notes, "each block below is read from disk when it runs"]
    if not notes and size > policy.limit:
        return [f"not cached; {number_of_bytes(size)} exceed memory.cache_limit_gb"]
    return notes or [NOT_WORTH_IT]
