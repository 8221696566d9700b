"""Batches without padding: rows joined into one, each attending to itself alone, where that is proved to be equal."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from llmtune.errors import first_line
from llmtune.frozen.cache import FrozenBlocks
from llmtune.kernels import device
from llmtune.kernels.attention import AttentionRouter, JoinError
from llmtune.kernels.cpu.attention import is_masked
from llmtune.kernels.rows import Inputs, JoinedRows
from llmtune.model.blocks import blocks, unwrap
from llmtune.model.sharded import reshard, states_of_sharded
from llmtune.training.joining.batch import Batch, model_inputs
from llmtune.training.joining.comparison import (
    EXACT,
    check_copies,
    check_rows,
    check_states,
    features_reversed,
    tolerance,
)
from llmtune.training.joining.depth import blocks_to_run, states_after

WINDOWS = ("sliding_window", "attention_chunk_size")
"""The keys of configurations for lengths, in tokens, from which on rows are attended to in another way."""
PROBED = 384
"""The tokens of a row that are tried, or twice the longest window that a row exceeds."""
Way = Literal["joined", "unmasked"]
"""Rows joined into one; or rows padded on the right without a mask, since no token sees what comes after it."""


class RowJoiner:
    """Joins the rows of a batch; where a model cannot, attention is spared the mask, but for short rows on CPUs."""

    def __init__(
        self, model: nn.Module, frozen_blocks: FrozenBlocks | None, autocast: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._outer, self._model = model, unwrap(model)
        self._frozen_blocks, self._autocast = frozen_blocks, autocast
        config = self._model.config.get_text_config()
        self._windows = [value for key in WINDOWS if isinstance(value := getattr(config, key, None), int)]
        self._uses_sdpa = self._model.config._attn_implementation == "sdpa"
        self._proved: dict[tuple[Way, int, bool], int] = {}
        """Up to how many tokens of joined rows a way was proved to be equal, 0 where it is not."""
        self.router: AttentionRouter | None = None
        """Attends to rows; they are joined while there is one."""
        self.refusals: dict[Way, str] = {}
        """Why a way was not taken, in words."""

    @property
    def ways(self) -> list[Way]:
        """The ways that were proved to be equal."""
        return [way for (way, *_), most in self._proved.items() if most]

    @property
    def note(self) -> str | None:
        """Why rows stay padded, in one line; None where they are joined, or nothing was tried."""
        reason = self.refusals.get("joined")
        return None if reason is None or "joined" in self.ways else f"rows stay padded: {reason}"

    def reset(self) -> None:
        """Prove it anew, since other blocks compute now."""
        self._proved = {}
        if self.router is not None:
            self.router.rows, self.router.hides_padding = None, True

    def prepare(
        self, inputs: Inputs, index: list[int] | None, lengths: Sequence[int] | None = None
    ) -> tuple[Inputs, JoinedRows | None]:
        """The model's inputs for a batch (B, T), and how its rows are joined, None where they stay padded.

        `index` names the rows to the cached frozen blocks. `lengths` are those of the rows in tokens; without them
        they are read from the mask, for which the host waits.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        lengths = mask.sum(1).tolist() if lengths is None else lengths
        batch = Batch(ids, lengths, index, is_masked(lengths, ids.shape[1], ids.device))
        way = self._choose(batch)
        rows = batch.joined() if way == "joined" else None
        if way == "unmasked":
            inputs = inputs | {"attention_mask": torch.ones_like(mask)}
        self._select(index, ids, rows, hides_padding=way != "unmasked")
        return (inputs if rows is None else model_inputs(ids, rows)), rows

    def _choose(self, batch: Batch) -> Way | None:
        """The fastest way that is proved to be equal for a batch."""
        ids, lengths, _, masked = batch
        if self.router is None or not self._uses_sdpa:
            return None
        if device.on_cpu(ids.device) and min(lengths) == ids.shape[1] and (masked or not self._passed(lengths)):
            return None  # there is no padding, and attention takes no mask as it is
        ways: tuple[Way, ...] = ("joined",) if masked else ("joined", "unmasked")
        return next((way for way in ways if self._is_equal(way, batch)), None)

    def _passed(self, lengths: Sequence[int]) -> list[int]:
        """The windows that the longest row exceeds."""
        return [window for window in self._windows if window < max(lengths)]

    def _is_equal(self, way: Way, batch: Batch) -> bool:
        """Whether a way is proved to be equal, for rows that exceed as many windows, and for as many joined tokens."""
        key = way, len(self._passed(batch.lengths)), batch.masked
        tokens, known = sum(batch.lengths) if way == "joined" else 1, self._proved.get(key)
        if known is None or 0 < known < tokens:
            self._proved[key] = self._prove_up_to(tokens, way, batch, known)
        return self._proved[key] >= tokens

    def _prove_up_to(self, tokens: int, way: Way, batch: Batch, known: int | None) -> int:
        """Up to how many tokens a way is proved to be equal, now that there are these; it was up to `known`."""
        sharded = self._is_sharded()
        # Processes that share weights prove together, in a first pass; their rows have different lengths.
        if sharded and any(other == way or most for (other, *_), most in self._proved.items()):
            return known or 0
        # With room, so that few batches of more tokens are tried; where weights are sharded, none is.
        most = 1 << (tokens * (2 if sharded else 1) - 1).bit_length()
        prove = partial(self._prove, way, batch, most) if known is None else partial(self._prove_places, batch, most)
        return most if self._try(way, batch, prove) else 0

    def _is_sharded(self) -> bool:
        # Weights are sharded after __init__.
        return any(isinstance(parameter, DTensor) for parameter in self._model.parameters())

    def _try(self, way: Way, batch: Batch, prove: Callable[[], None]) -> bool:
        """Prove it, in all processes where weights are sharded; False where the model or a kernel refuses."""
        ids, sharded = batch.ids, self._is_sharded()
        if self.router is None or (sharded and device.on_cpu(ids.device)):
            return False
        training = self._model.training
        self._model.eval()
        self.router.proved, self.router.refused = set(), None
        try:
            with torch.no_grad(), self._autocast():
                prove()
            if self.router.refused is not None:
                raise JoinError(self.router.refused)
            equal = True
        except torch.OutOfMemoryError:
            raise
        # What a model's own code does with such rows is unknown.
        except (JoinError, RuntimeError, TypeError, ValueError, LookupError) as error:
            equal, self.refusals[way] = False, first_line(error)
        finally:
            self._model.train(training)
            self._select(None, ids, None)
            self.router.proved = self.router.refused = None
        if sharded:
            reshard(self._outer)
            equal = _in_all_processes(equal, ids.device)
        return equal

    def _prove(self, way: Way, batch: Batch, most: int) -> None:
        """Compare the shortest and the longest row with what they give padded and masked; raises JoinError."""
        ids, lengths, index, masked = batch
        order = sorted(range(len(lengths)), key=lambda row: lengths[row])
        probes = [order[0], order[-1]]
        passed = self._passed(lengths)
        width = min(ids.shape[1], max(PROBED, 2 * max(passed, default=0)))
        # Where all rows are as long, one is cut: without padding, nothing would be tried.
        kept = [max(1, min(lengths[probes[0]], width - 1)), min(lengths[probes[1]], width)]
        whole, probe_index = ids[probes], [index[row] for row in probes] if index else None
        ids = whole[:, :width]
        rows = JoinedRows(kept, width, ids.device, masked)
        real = (torch.arange(width) < torch.tensor(kept)[:, None]).to(ids.device)
        depth = self._depth()
        self._select(probe_index, whole, None, width)
        padded = self._hidden({"input_ids": ids, "attention_mask": real.long()}, depth)
        expected = rows.joined(padded)
        near = tolerance(padded, depth)
        if way == "unmasked":
            self._select(probe_index, whole, None, width, hides_padding=False)
            unmasked = self._hidden({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, depth)
            check_rows(rows.joined(unmasked), expected, rows, passed, near, "hidden states without a mask")
            return
        self._select(probe_index, whole, rows, width)
        joined = self._hidden(model_inputs(ids, rows), depth)
        with features_reversed(self._model, kept[0]):
            moved = self._hidden(model_inputs(ids, rows), depth)
        if not masked:
            self._try_in_training(ids, rows, depth)
        copies = self._copies(batch, most)
        check_rows(joined, expected, rows, passed, near, "hidden states of joined rows")
        check_states(
            moved[0, kept[0] : -1], joined[0, kept[0] : -1], EXACT, "hidden states of a row beside another one"
        )
        check_copies(copies)

    def _prove_places(self, batch: Batch, most: int) -> None:
        """Show that a row gives the same wherever it stands among up to `most` joined tokens; raises JoinError."""
        check_copies(self._copies(batch, most))

    def _copies(self, batch: Batch, most: int) -> torch.Tensor:
        """Hidden states (C, T, H) of copies of a row that are joined, the last one after `most` tokens."""
        copies = batch.copies(PROBED, most)
        rows = copies.joined()
        if self.router is not None:
            self.router.proved = None  # to compare kernels on so many tokens takes much memory
        self._select(copies.stored, batch.ids, rows, copies.ids.shape[1])
        states = self._hidden(model_inputs(copies.ids, rows), self._depth())
        return states[0, :-1].reshape(*copies.ids.shape, -1)

    def _try_in_training(self, ids: torch.Tensor, rows: JoinedRows, depth: int) -> None:
        """Let a kernel refuse what a model does in training alone, such as dropout of attention weights."""
        self._model.train()
        with torch.random.fork_rng([ids.device] if ids.device.type == "cuda" else []):
            self._hidden(model_inputs(ids, rows), depth)
        self._model.eval()

    def _depth(self) -> int:
        """The blocks that are run for a comparison."""
        if self._is_sharded():
            return len(blocks(self._model))
        return blocks_to_run(self._model, self._frozen_blocks.boundary if self._frozen_blocks else 0)

    def _hidden(self, inputs: Inputs, depth: int) -> torch.Tensor:
        """Hidden states (B, T, H) of the last of `depth` blocks; sharded, of the last of all, normed."""
        sharded = self._is_sharded()
        return states_of_sharded(self._outer, inputs) if sharded else states_after(self._model, depth, inputs)

    def _select(
        self,
        index: list[int] | None,
        ids: torch.Tensor,
        rows: JoinedRows | None,
        width: int | None = None,
        hides_padding: bool = True,
    ) -> None:
        """Let attention, and cached outputs for frozen blocks, be those of these rows of ids (B, T), cut to `width`."""
        if self.router is not None:
            self.router.rows, self.router.hides_padding = rows, hides_padding

        def rearrange(outputs: torch.Tensor) -> torch.Tensor:
            cut = outputs[:, :width]
            return cut if rows is None else rows.joined(cut.expand(rows.shape[0], -1, -1))

        if self._frozen_blocks is not None and index is not None:
            as_stored = rows is None and width is None
            self._frozen_blocks.select(index, ids.shape[1], ids.device, None if as_stored else rearrange)


def _in_all_processes(equal: bool, device: torch.device) -> bool:
    verdict = torch.full((), int(equal), device=device)
    dist.all_reduce(verdict, dist.ReduceOp.MIN)
    return bool(verdict)
