"""Batches without padding: rows joined into one, each attending to itself alone, where that is proved to be equal."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from llmtune.frozen.cache import FrozenBlocks
from llmtune.kernels.cpu.attention import SHORT, AttentionRouter, JoinedRows
from llmtune.model.blocks import unwrap

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
        router.rows = None
        self._model.train(training)
        ours, expected = (states[0, :-1].float() for states in (joined, rows.joined(padded)))
        tolerance = ROUNDED if mixed or padded.dtype != torch.float32 else EXACT
        return float((ours - expected).norm() / expected.norm()) <= tolerance

    def _select_cached(self, index: list[int] | None, ids: torch.Tensor, rows: JoinedRows | None) -> None:
        """Let cached outputs stand in for the frozen blocks of these rows of ids (B, T), joined or padded."""
        if self._frozen_blocks is not None and index is not None:
            self._frozen_blocks.select(index, ids.shape[1], ids.device, rows.joined if rows else None)


def model_inputs(ids: torch.Tensor, rows: JoinedRows) -> dict[str, torch.Tensor]:
    """A model's inputs for rows (B, T) that are joined: ids and positions, which start anew at every row."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return {"input_ids": rows.joined(ids), "position_ids": rows.joined(positions)}
