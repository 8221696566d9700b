"""The prefix kept once: outputs of the blocks that do not train, computed once a row and given back at every step.

The *boundary* of a stage is the number of blocks below the lowest one that trains. In training, each of these blocks
is replaced by one that returns what was kept, so that the model's own forward still makes masks and rotary embeddings.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from llmtune.errors import MachineError, RecipeError, TrainingError
from llmtune.frozen.boundary import Span, choose_boundaries, find_randomness
from llmtune.frozen.build import CacheEntry, build_by_block, build_in_one_pass
from llmtune.frozen.stand_in import Layout, StubbedDecoder
from llmtune.frozen.store import StoredOutputs, entry_name, longest_first, make_room
from llmtune.frozen.stream import OffloadedBlocks
from llmtune.memory import release_pages

PROBED = 3


@dataclass(frozen=True)
class CachePolicy:
    """What may be kept where: `facts` name the base and its precision, `adapter` counts where it lies in the prefix.

    With a `shelf`, the blocks below its boundary are not in memory, and what they give must be kept.
    """

    folder: Path
    facts: dict[str, Any]
    adapter: dict[str, Any] | None
    limit: int
    always: bool
    shelf: OffloadedBlocks | None = None


class FrozenBlocks:
    """Keeps, gives back and proves the outputs of the blocks below a stage's boundary, for rows of token ids."""

    def __init__(self, rows: Sequence[list[int]], keeping: CachePolicy) -> None:
        self._rows, self._keeping = rows, keeping
        self._decoder: StubbedDecoder | None = None
        self._states: dict[int, StoredOutputs] = {}
        self._installed = 0
        self._gone = 0

    @property
    def kept(self) -> list[int]:
        """The boundaries whose states are at hand."""
        return sorted(self._states)

    def begin(
        self,
        model: nn.Module,
        wanted: list[Span],
        distance: dict[str, int],
        autocast: Callable[[], Any],
        before: list[int] | None = None,
    ) -> str | None:
        """Keep what the coming stages profit from; gives one line on it, None where no stage has a prefix.

        Where a run goes on, the boundaries `before` are kept, whatever would pay now: its result stays the same.
        Raises a one-line error where blocks that are not in memory cannot be stood in for.
        """
        useful = sorted({span.boundary for span in wanted if span.boundary})
        if not useful:
            return None
        decoder = self._decoder = StubbedDecoder(model, self._rows, autocast)
        with self._lending():
            reason = find_randomness(decoder.inner, decoder.blocks[useful[-1] :])
            reason = reason or decoder.look(first=self._keeping.shelf is not None) or self._low(model, distance)
            if reason and self._keeping.shelf:
                raise RecipeError(f"memory.frozen_blocks: stream does not work here: {reason}")
            if reason:
                return f"frozen blocks: computed at every step: {reason}"
            said = self._keep(
                decoder, wanted, {boundary: self._place(boundary, distance) for boundary in useful}, before
            )
        gone = self._let_go(wanted)
        return f"frozen blocks: {'; '.join([*said, gone] if gone else said)}"

    def _keep(
        self, decoder: StubbedDecoder, wanted: list[Span], places: dict[int, CacheEntry], before: list[int] | None
    ) -> list[str]:
        """Open, build and prove what is worth keeping at these boundaries, and say what was done."""
        limit = self._keeping.limit
        there = {boundary for boundary, place in places.items() if place.there()}
        whole = {boundary for boundary in there if places[boundary].whole()}
        size = sum(decoder.lengths) * decoder.width * decoder.dtype.itemsize
        said = [f"{len(there - whole)} damaged or foreign, never used"] if there - whole else []
        streamed = self._stream(decoder, size) if self._keeping.shelf and min(places) not in whole else set()
        at_hand = whole | streamed
        chosen = set(choose_boundaries(wanted, at_hand, len(self._rows), size, limit, self._keeping.always))
        if before is not None:
            chosen = set(places) & {*before, *streamed}
        for boundary in chosen & at_hand:
            self._states[boundary] = places[boundary].open(decoder)
        missing = {boundary: places[boundary] for boundary in sorted(chosen - at_hand)}
        if missing:
            make_room(self._keeping.folder, size * len(missing), limit, {places[b].folder for b in chosen})
            start = self._below(min(missing))
            reason = build_in_one_pass(decoder, missing, size, start, self._states.get(start))
            if reason:
                said.append(f"not kept: {reason}")
            else:
                self._states |= {boundary: place.open(decoder) for boundary, place in missing.items()}
        self._keep_proved(decoder, said)
        for word, which in (("kept", set(self.kept) - whole), ("reused", set(self.kept) & whole)):
            if which:
                mb = len(which) * size / 2**20
                said.insert(0, f"{word} below block {', '.join(map(str, sorted(which)))} ({mb:,.0f} MB)")
        if self._keeping.shelf:
            said.append("each block below read when needed, never held")
        if not said and size > limit:
            said.append(f"computed at every step: {size / 2**30:.2g} GB would pass memory.cache_limit_gb")
        return said or ["computed at every step: too few passes over the rows to pay"]

    def _stream(self, decoder: StubbedDecoder, size: int) -> set[int]:
        """Build the states at the shelf's boundary a block at a time; raises MachineError where disk lacks."""
        shelf = self._keeping.shelf
        assert shelf is not None
        if size * min(2, shelf.low) > self._keeping.limit:
            raise MachineError(f"memory.cache_limit_gb: streaming needs {size * 2 / 2**30:.2g} GB of kept outputs")
        places = [self._place(boundary, {}) for boundary in range(1, shelf.low + 1)]
        try:
            build_by_block(decoder, shelf, places, size, self._keeping.limit)
        except OSError as error:
            raise MachineError(f"memory.frozen_blocks: stream needs disk: {error}") from error
        return {shelf.low}

    def _keep_proved(self, decoder: StubbedDecoder, said: list[str]) -> None:
        """Drop what the probe finds different; raises TrainingError where nothing else could take its place."""
        gaps, allowed = self._probe(decoder)
        for boundary, gap in gaps.items():
            if gap <= allowed:
                continue
            line = f"outputs of block {boundary} differ from the plain path's by {gap:.1e}"
            if self._keeping.shelf and boundary == self._keeping.shelf.low:
                raise TrainingError(f"memory.frozen_blocks: stream does not work with this model: {line}")
            del self._states[boundary]
            said.append(f"{line}: not used")

    def enter(self, boundary: int) -> None:
        """Let the blocks below a boundary return what was kept, as far up as it was; every other block computes."""
        self._installed = self._below(boundary + 1)
        if self._decoder:
            self._decoder.arrange(self._installed)

    def _below(self, boundary: int) -> int:
        """The highest boundary kept below another one, 0 where there is none."""
        return max((kept for kept in self._states if kept < boundary), default=0)

    def _lending(self) -> AbstractContextManager[None]:
        """Blocks that are not in memory get their weights when they compute, where there are such blocks."""
        shelf = self._keeping.shelf
        return shelf.lending(self._decoder.blocks) if shelf and self._decoder else nullcontext()

    def _low(self, model: nn.Module, distance: dict[str, int]) -> str | None:
        """Why nothing can be kept where something below the blocks trains that is no embedding."""
        assert self._decoder is not None
        live, count = dict(model.named_parameters()), len(self._decoder.blocks)
        low = [name for name, far in distance.items() if id(live[name]) in self._decoder.entry and far <= count]
        return f"{low[0]} works below the blocks and trains" if low else None

    def _let_go(self, wanted: list[Span]) -> str | None:
        """Free the weights of blocks that no coming stage runs: the result is made of what trained, not of them."""
        floor = min(span.boundary for span in wanted)
        if floor not in self._states or self._decoder is None:
            return None
        self._gone, freed = floor, 0
        listed = self._decoder.blocks
        stays = {p.data_ptr() for block in listed[floor:] for p in block.parameters()}
        for parameter in (parameter for block in listed[:floor] for parameter in block.parameters()):
            # Quantized weights are small and not made for this; shared ones are still needed.
            if type(parameter) is not nn.Parameter or parameter.data_ptr() in stays:
                continue
            release_pages(parameter.data)
            freed += parameter.numel() * parameter.element_size()
            parameter.data = parameter.data.new_empty(0)
        return f"{freed / 2**20:,.0f} MB of weights let go" if freed else None

    def end(self) -> None:
        """Let every block compute again, save those whose weights were let go."""
        if not self._gone:
            self.enter(0)

    def select(self, rows: Sequence[int], tokens: int, device: torch.device, lay: Layout | None = None) -> None:
        """Say which rows, padded to how many tokens and laid out how, the next forward pass is about."""
        if self._installed and self._decoder:
            self._decoder.give(self._states[self._installed], rows, tokens, device, lay)

    def _place(self, boundary: int, distance: dict[str, int]) -> CacheEntry:
        """Where the states below a boundary lie, by what they depend on, as plain values."""
        decoder = self._decoder
        assert decoder is not None
        inside = [tensor for block in decoder.blocks[:boundary] for tensor in block.parameters()]
        adapted = any(len(decoder.blocks) - far < boundary for far in distance.values()) and self._keeping.adapter
        facts = {
            **self._keeping.facts,
            "adapter": adapted or None,
            "attention": decoder.inner.config._attn_implementation,
            "boundary": boundary,
            "device": inside[0].device.type,
            "dtype": str(decoder.dtype),
            "rows": self._ids,
            "versions": [torch.__version__, transformers.__version__],
            "weights": sorted({str(tensor.dtype) for tensor in inside}),
            "width": decoder.width,
        }
        return CacheEntry(self._keeping.folder / entry_name(facts), facts)

    @cached_property
    def _ids(self) -> str:
        return hashlib.sha256("\n".join(" ".join(map(str, row)) for row in self._rows).encode()).hexdigest()

    def _probe(self, decoder: StubbedDecoder) -> tuple[dict[int, float], float]:
        """How far each kept path's outputs are from the plain path's on a few rows, and how far they may be.

        Relative in the Euclidean norm. They may be as far as rounding, or twice what batching the same rows otherwise
        does to the plain path.
        """
        if not self._states:
            return {}, 0.0
        order = longest_first(decoder.lengths)
        rows = sorted({order[place * (len(order) - 1) // max(1, PROBED - 1)] for place in range(PROBED)})
        decoder.arrange()
        plain = decoder.forward(rows)
        # Where blocks are not in memory, each pass over the plain path reads them all.
        single = rows[:1] if self._keeping.shelf else rows
        alone = [decoder.forward([row])[0] for row in single]
        apart = torch.stack([nn.functional.pad(one, (0, 0, 0, plain.shape[1] - len(one))) for one in alone])
        gaps = {}
        for boundary, kept in self._states.items():
            decoder.arrange(boundary)
            gaps[boundary] = _gap(decoder.forward(rows, kept), plain)
        decoder.arrange()
        return gaps, max(1e-6 if decoder.whole else 2**-7, 2 * _gap(apart, plain[: len(single)]))


def _gap(ours: torch.Tensor, plain: torch.Tensor) -> float:
    return float((ours - plain).norm() / plain.norm())
