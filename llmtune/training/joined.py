"""Batches without padding: rows joined into one, each attending to itself alone, where that is proved to be equal."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from llmtune.frozen.cache import FrozenBlocks
from llmtune.kernels.cpu.attention import SHORT, AttentionRouter, JoinedRows
from llmtune.model.blocks import blocks, unwrap

EXACT, ROUNDED = 1e-5, 2**-6
"""How far joined hidden states may be from padded ones, relative in the norm: in fp32, and in bf16."""


class RowJoiner:
    """Joins the short rows of a batch on CPUs; transformers keeps rows apart by their positions, where a model can."""

    def __init__(
        self,
        model: nn.Module,
        frozen_blocks: FrozenBlocks | None,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._model, self._frozen_blocks, self._autocast = unwrap(model), frozen_blocks, autocast
        self._equal: bool | None = None
        self._uses_sdpa = self._model.config._attn_implementation == "sdpa"
        self.router: AttentionRouter | None = None
        """Attends to short rows; rows are joined while there is one."""

    def reset(self) -> None:
        """Prove it anew, since other blocks compute now."""
        self._equal = None

    def prepare(
        self, inputs: dict[str, torch.Tensor], index: list[int] | None
    ) -> tuple[dict[str, torch.Tensor], JoinedRows | None]:
        """The model's inputs for a batch (B, T), and how its rows are joined, None where they stay padded.

        `index` names the rows to the cached frozen blocks.
        """
        rows = self._join(inputs, index)
        if self.router is not None:
            self.router.rows = rows
        self._select_cached(index, inputs["input_ids"], rows)
        return (inputs if rows is None else model_inputs(inputs["input_ids"], rows)), rows

    def _join(self, inputs: dict[str, torch.Tensor], index: list[int] | None) -> JoinedRows | None:
        real = inputs["attention_mask"].bool()
        short = self._uses_sdpa and real.device.type == "cpu" and real.shape[1] <= SHORT
        if self.router is None or not short or bool(real.all()):
            return None
        if self._equal is None:
            # Weights are sharded after __init__, and a part of a sharded model cannot run alone.
            sharded = any(isinstance(parameter, DTensor) for parameter in self._model.parameters())
            self._equal = not sharded and self._prove(inputs["input_ids"], real, index, self.router)
        return JoinedRows(real) if self._equal else None

    @torch.no_grad()
    def _prove(self, ids: torch.Tensor, real: torch.Tensor, index: list[int] | None, router: AttentionRouter) -> bool:
        """Whether the shortest and the longest row give the same hidden states joined as they give padded."""
        lengths = real.sum(1)
        probes = [int(lengths.argmin()), int(lengths.argmax())]
        ids, real, rows = ids[probes], real[probes], JoinedRows(real[probes])
        probe_index = [index[row] for row in probes] if index else None
        decoder: nn.Module = self._model.base_model
        training = self._model.training
        self._model.eval()
        with self._autocast():
            mixed = torch.is_autocast_enabled("cpu")
            self._select_cached(probe_index, ids, None)
            padded = decoder(input_ids=ids, attention_mask=real.long(), use_cache=False)[0]
            self._select_cached(probe_index, ids, rows)
            router.rows = rows
            joined = decoder(**model_inputs(ids, rows), use_cache=False)[0]
            first = int(real[0].sum())
            with _reversed(self._model, first):
                moved = decoder(**model_inputs(ids, rows), use_cache=False)[0]
        router.rows = None
        self._model.train(training)
        rounds = mixed or padded.dtype != torch.float32
        equal = _is_near(joined[0, :-1], rows.joined(padded)[0, :-1], ROUNDED if rounds else EXACT)
        return equal and _is_near(moved[0, first:-1], joined[0, first:-1], EXACT)

    def _select_cached(self, index: list[int] | None, ids: torch.Tensor, rows: JoinedRows | None) -> None:
        """Let cached outputs stand in for the frozen blocks of these rows of ids (B, T), joined or padded."""
        if self._frozen_blocks is not None and index is not None:
            self._frozen_blocks.select(index, ids.shape[1], ids.device, rows.joined if rows else None)


def _is_near(ours: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return float((ours.float() - expected.float()).norm() / expected.float().norm()) <= tolerance


@contextmanager
def _reversed(model: nn.Module, count: int) -> Iterator[None]:
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


def model_inputs(ids: torch.Tensor, rows: JoinedRows) -> dict[str, torch.Tensor]:
    """A model's inputs for rows (B, T) that are joined: ids and positions, which start anew at every row."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return {"input_ids": rows.joined(ids), "position_ids": rows.joined(positions)}
