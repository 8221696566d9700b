"""Batches without padding: rows joined into one, each attending to itself alone, where that is proved to be equal."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from llmtune.frozen.cache import FrozenBlocks
from llmtune.kernels.cpu.attention import SHORT, AttentionRouter, JoinedRows
from llmtune.model.blocks import unwrap

EXACT, ROUNDED = 1e-5, 2**-6


class RowJoiner:
    """Joins the short rows of a batch on CPUs; transformers keeps rows apart by their positions, where a model can."""

    def __init__(self, model: nn.Module, frozen_blocks: FrozenBlocks | None, autocast: Callable[[], Any]) -> None:
        inner: Any = unwrap(model)
        self._inner, self._frozen_blocks, self._autocast = inner, frozen_blocks, autocast
        self._equal: bool | None = None
        self._may = inner.config._attn_implementation == "sdpa"

    def again(self) -> None:
        """Prove it anew, since other blocks compute now."""
        self._equal = None

    def rows(
        self, inputs: dict[str, torch.Tensor], index: list[int] | None, chooser: AttentionRouter | None
    ) -> JoinedRows | None:
        """How a batch's rows are joined, None where they are to stay padded; `index` names them in the prefix."""
        real = inputs["attention_mask"].bool()
        fits = self._may and real.device.type == "cpu" and real.shape[1] <= SHORT
        if chooser is None or not fits or bool(real.all()):
            return None
        if self._equal is None:
            # Weights are sharded after this was made, and a part of a sharded model cannot be asked alone.
            sharded = any(isinstance(parameter, DTensor) for parameter in self._inner.parameters())
            self._equal = not sharded and self._prove(inputs["input_ids"], real, index, chooser)
        return JoinedRows(real) if self._equal else None

    @torch.no_grad()
    def _prove(self, ids: torch.Tensor, real: torch.Tensor, index: list[int] | None, chooser: AttentionRouter) -> bool:
        """Whether the shortest and the longest row give the same hidden states joined as they give padded."""
        lengths = real.sum(1)
        two = [int(lengths.argmin()), int(lengths.argmax())]
        ids, real, rows = ids[two], real[two], JoinedRows(real[two])
        select = [index[row] for row in two] if index else None
        decoder: Any = self._inner.base_model
        training = self._inner.training
        self._inner.eval()
        with self._autocast():
            mixed = torch.is_autocast_enabled("cpu")
            self.give(select, ids, None)
            padded = decoder(input_ids=ids, attention_mask=real.long(), use_cache=False)[0]
            self.give(select, ids, rows)
            chooser.rows = rows
            joined = decoder(**arguments(ids, rows), use_cache=False)[0]
        chooser.rows = None
        self._inner.train(training)
        ours, wanted = (states[0, :-1].float() for states in (joined, rows.joined(padded)))
        allowed = ROUNDED if mixed or padded.dtype != torch.float32 else EXACT
        return float((ours - wanted).norm() / wanted.norm()) <= allowed

    def give(self, index: list[int] | None, ids: torch.Tensor, rows: JoinedRows | None) -> None:
        """Let the prefix stand in for these rows of ids (B, T), joined or padded."""
        if self._frozen_blocks is not None and index is not None:
            self._frozen_blocks.select(index, ids.shape[1], ids.device, rows.joined if rows else None)


def arguments(ids: torch.Tensor, rows: JoinedRows) -> dict[str, torch.Tensor]:
    """What a model takes for rows (B, T) that are joined: ids and positions, which start anew at every row."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return {"input_ids": rows.joined(ids), "position_ids": rows.joined(positions)}
