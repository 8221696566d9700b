"""Runs a model's blocks with some of them stubbed: by cached output, or by identity."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from llmtune.data.store.encoded import TokenIds
from llmtune.errors import first_line
from llmtune.frozen.reader import OutputReader
from llmtune.frozen.store import longest_first
from llmtune.kernels.rows import Inputs, JoinedRows
from llmtune.model.blocks import blocks, decoder, unwrap
from llmtune.model.sharded import reshard, states_of_sharded
from llmtune.model.tokens import angles_limit

Rearrange = Callable[[torch.Tensor], torch.Tensor]
"""Rearranges block outputs (B, T, H) as the rows of a batch are, such as joined into one row without padding."""
Join = Callable[[Inputs, list[int], Sequence[int]], tuple[Inputs, JoinedRows | None]]
"""Gives a model's inputs for padded rows, these ones, of these lengths, and how they are joined; None for padded ones.

It chooses the cached outputs of these rows too.
"""
Output = torch.Tensor | tuple[torch.Tensor | None, ...]
"""What a block returns: hidden states, alone or first in a tuple."""
_OWN = "_class_before_stub"
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


class StubError(Exception):
    """A model whose blocks cannot be stubbed, and why."""


def hidden_states(output: object) -> torch.Tensor:
    """The hidden states (B, T, H) in what a block returns; raises StubError where there are none."""
    hidden = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3:
        raise StubError("this model's blocks do not return hidden states alone")
    return hidden


class StubbedDecoder:
    """The part of a model below its head, over rows of token ids; masks and positions stay the model's own."""

    def __init__(
        self, model: nn.Module, rows: Sequence[list[int]], autocast: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self._whole, self.sharded = model, isinstance(model, FSDPModule)
        self.inner: PreTrainedModel = unwrap(model)
        self.blocks: list[nn.Module] = list(blocks(model))
        self.lengths = list(rows.lengths) if isinstance(rows, TokenIds) else [len(row) for row in rows]
        self.width, self.dtype = 0, torch.float32
        self._rows, self._autocast = rows, autocast
        self.join: Join | None = None
        self.cached = 0
        """How many blocks are stubbed by their cached output."""
        self._cached: torch.Tensor | None = None
        self._rest: tuple[None, ...] | None = None

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        device: torch.device = next(self.inner.parameters()).device
        return device

    @property
    def in_fp32(self) -> bool:
        """Whether the model computes in fp32."""
        with self._autocast():
            mixed = torch.is_autocast_enabled(self.device.type)
        return not mixed and all(parameter.dtype == torch.float32 for parameter in self.inner.parameters())

    def stub(self, cached: int = 0, end: int | None = None) -> None:
        """Stub the first `cached` blocks by their cached output and those from `end` on by identity; others compute."""
        self.cached = cached
        for index, block in enumerate(self.blocks):
            skipped = end is not None and index >= end
            _set_forward(block, self._return_cached if index < cached else self._return_input if skipped else None)

    def set_cached(
        self,
        stored: OutputReader,
        rows: Sequence[int],
        tokens: int,
        device: torch.device,
        rearrange: Rearrange | None = None,
    ) -> None:
        """Let stubs return the stored outputs of these rows, padded to `tokens`, rearranged by `rearrange`."""
        outputs = stored.fetch(rows, tokens).to(device)
        self._cached = rearrange(outputs) if rearrange else outputs

    def inspect(self, boundaries: Sequence[int]) -> str | None:
        """Run the shortest row through the first block and from each boundary on, to learn what blocks return and need.

        Returns the reason where the blocks below these boundaries cannot be stubbed.
        """
        limit = angles_limit(self.inner.config)
        if limit is not None and max(self.lengths) > limit:
            return f"a row of more than {limit:,} tokens changes the rotary angles of the rows beside it"
        row = [min(range(len(self._rows)), key=self.lengths.__getitem__)]
        try:
            with self.stubbed():
                hidden = self._cached = self._first_output(row)
                self.width, self.dtype = hidden.shape[-1], hidden.dtype
                for boundary in boundaries:
                    self.stub(boundary)
                    self.forward(row)
                self._cached = None
        except StubError as error:
            return str(error)
        return None

    def _first_output(self, rows: Sequence[int]) -> torch.Tensor:
        """The hidden states (B, T, H) that the first block returns."""
        outputs: list[object] = []

        def note_output(module: nn.Module, arguments: object, output: object) -> None:
            outputs.append(output)
            if isinstance(output, tuple):
                # Nobody here asks for the rest of the tuple, attention weights; a model that uses it is refused.
                self._rest = (None,) * (len(output) - 1)

        self.stub(0, 1)
        with self.blocks[0].register_forward_hook(note_output):
            self.forward(rows)
        return hidden_states(outputs[0] if len(outputs) == 1 else None)

    @contextmanager
    def stubbed(self) -> Iterator[None]:
        """Let every block compute again at the end; raises StubError where one needs what a stub does not return."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        # What a model's own code does without what its blocks hand on in other ways is unknown.
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            needs = "this model's blocks need more than the output of the block below"
            raise StubError(f"{needs} ({type(error).__name__}: {first_line(error)})") from error
        finally:
            self.stub()

    def batches(self) -> Iterator[list[int]]:
        """Rows, longest first, in batches of a size that suits the device."""
        most = BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cpu"])
        order = longest_first(self.lengths)
        while order:
            count = max(1, most // self.lengths[order[0]])
            yield order[:count]
            del order[:count]

    @torch.no_grad()
    def forward(
        self,
        rows: Sequence[int],
        stored: OutputReader | None = None,
        take: Mapping[int, Callable[[torch.Tensor], None]] | None = None,
    ) -> torch.Tensor:
        """The last hidden states (B, T, H) of rows, right-padded, in evaluation mode; stubs return `stored`.

        `take` is given the outputs (B, T, H) of the blocks below boundaries. Of a sharded model, every process must run
        the same rows.
        """
        device = self.device
        lengths = [self.lengths[row] for row in rows]
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : lengths[index]] = torch.tensor(self._rows[row])
            mask[index, : lengths[index]] = 1
        inputs, joined = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, None
        with ExitStack() as restored:
            restored.callback(self.inner.train, self.inner.training)
            self.inner.eval()
            if self.join is not None:
                inputs, joined = self.join(inputs, list(rows), lengths)
            elif stored is not None:
                self.set_cached(stored, rows, max(lengths), device)
            for boundary, taker in (take or {}).items():
                hook = self.blocks[boundary - 1].register_forward_hook(partial(_hand, taker, joined))
                restored.enter_context(hook)
            if self.sharded:
                restored.callback(reshard, self._whole)
            with self._autocast():
                hidden = (
                    states_of_sharded(self._whole, inputs)
                    if self.sharded
                    else decoder(self.inner)(**inputs, use_cache=False)[0]
                )
        hidden = joined.padded(hidden) if joined else hidden
        result: torch.Tensor = hidden.float() * mask[..., None].to(device)
        return result

    def _return_cached(self, *arguments: object, **options: object) -> Output | None:
        return self._cached if self._rest is None else (self._cached, *self._rest)

    def _return_input(self, *arguments: torch.Tensor, **options: torch.Tensor) -> Output:
        hidden = arguments[0] if arguments else options["hidden_states"]
        return hidden if self._rest is None else (hidden, *self._rest)


def _hand(
    taker: Callable[[torch.Tensor], None],
    joined: JoinedRows | None,
    module: nn.Module,
    arguments: object,
    output: object,
) -> None:
    """Give the hidden states (B, T, H) that a block returns to what takes them."""
    hidden = hidden_states(output)
    taker(joined.padded(hidden) if joined else hidden)


def _set_forward(block: nn.Module, forward: Callable[..., Output | None] | None) -> None:
    """Replace a block's forward, or restore its own."""
    if isinstance(block, FSDPModule):
        _set_call(block, forward)
    elif forward is None:
        vars(block).pop("forward", None)
    else:
        vars(block)["forward"] = forward


def _set_call(block: nn.Module, forward: Callable[..., Output | None] | None) -> None:
    """Replace a call of a sharded block, or restore it: its hooks would gather the weights that a stub does not use."""
    own = getattr(block, _OWN, type(block))
    block.__class__ = (
        own if forward is None else type(own.__name__, (own,), {_OWN: own, "__call__": staticmethod(forward)})
    )
