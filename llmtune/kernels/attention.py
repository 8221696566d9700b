"""The attention that models compute with while they train: a kernel for CPUs, one for joined rows, or the default."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from llmtune.kernels import device, varlen
from llmtune.kernels.cpu import block_attention
from llmtune.kernels.cpu.attention import attend, is_long, is_short
from llmtune.kernels.rows import JoinedRows

SDPA = "sdpa"
Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""An attention function of transformers: outputs, and attention weights or None."""
Mask = Callable[..., torch.Tensor | None]
"""A function of transformers that makes masks."""


class JoinError(Exception):
    """A model attends in a way that no kernel for joined rows computes."""


class AttentionRouter:
    """Replaces transformers' "sdpa" and its masks: sends rows to the kernel that is made for them, or to the default.

    On CPUs, short rows go to `ShortAttention`, and long or many ones to `BlockAttention`, which keeps joined rows
    apart by itself. On GPUs, a kernel for rows of various lengths does.
    """

    def __init__(self, default: Attention, default_mask: Mask) -> None:
        self._default, self._default_mask = default, default_mask
        # What the default knows beside its first five arguments changes its results; `is_causal` not beside a mask.
        self._changing = {"softcap", "s_aux", *list(signature(default).parameters)[5:]}
        self._changing -= {"dropout", "scaling", "is_causal", "kwargs"}
        self._last_mask: torch.Tensor | None = None
        self._last_bias = torch.empty(0)
        self.rows: JoinedRows | None = None
        """How the rows of this pass are joined."""
        self.hides_padding = True
        """Whether masks hide padding; without it, rows that are padded on the right need no mask at all."""
        self.proved: set[tuple[object, ...]] | None = None
        """While not None, each call of a kernel is compared with exact attention, once for its shapes."""
        self.refused: str | None = None
        """Why the kernel cannot be relied on, where a comparison showed it."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the default attend while the block runs: generation reads a cache, and pads on the left."""
        AttentionInterface.register(SDPA, self._default)
        AttentionMaskInterface.register(SDPA, self._default_mask)
        try:
            yield
        finally:
            AttentionInterface.register(SDPA, self)
            AttentionMaskInterface.register(SDPA, self.make_mask)

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if torch.is_autocast_enabled(query.device.type):
            # As autocast does with the default: rotary embeddings may have left queries and keys in fp32.
            precision = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(precision), key.to(precision), value.to(precision)
        plain = dropout == 0 and all(options.get(name) is None for name in self._changing)
        rows = self.rows if self.rows and query.shape[::2] == (1, self.rows.length) else None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        causal = options.get("is_causal")
        if rows is not None and not rows.masked:
            if not plain or attention_mask is not None or causal is False:
                raise JoinError(f"{type(module).__name__} attends with {'its own mask' if plain else 'an extra'}")
            return self._attend_joined(query, key, value, rows, scale, options.get("sliding_window")), None
        if plain and attention_mask is not None and is_short(query, key, value, attention_mask, rows):
            bias = self._bias(attention_mask, rows)
            with torch.autocast(query.device.type, enabled=False):  # which would compute the scores in bf16
                return attend(query, key, value, bias, scale, rows), None
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if plain and attention_mask is None and causal and is_long(query, key, value):
            return block_attention.attend(query, key, value, scale), None
        options = {"dropout": dropout, "scaling": scaling, **options}
        return self._default(module, query, key, value, attention_mask, **options)

    def _attend_joined(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: JoinedRows,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Outputs (1, N, H, V) of queries (1, H, N, D), keys (1, K, N, D) and values (1, K, N, V)."""
        kernel = block_attention.attend_joined if device.on_cpu(query.device) else varlen.kernel()
        if kernel is None:
            raise JoinError("no kernel for rows of various lengths is installed")
        window = None if window is None or window >= rows.longest else window
        value_width, missing = value.shape[-1], query.shape[-1] - value.shape[-1]
        if missing > 0:  # as in latent attention; kernels take heads of one width
            value = functional.pad(value, (0, missing))
        heads = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
        tries = self.proved is not None
        if self.refused is not None or (tries and not self._is_proved(kernel, heads, rows, scale, window)):
            # In sharded runs every process has to reach the end of the pass, whatever one finds.
            kernel = varlen.row_by_row
        out = kernel(heads, rows, scale, window)[None]
        return out[..., :value_width] if missing > 0 else out

    def _is_proved(
        self, kernel: varlen.Kernel, heads: varlen.Heads, rows: JoinedRows, scale: float, window: int | None
    ) -> bool:
        """Whether a kernel is right for heads of these shapes; tried once, and noted in `refused` where it is not."""
        shapes = (*(tensor.shape for tensor in heads), heads[0].dtype, scale, window)
        if self.proved is not None and shapes not in self.proved:
            self.proved.add(shapes)
            try:
                if not varlen.is_right(kernel, heads, rows, scale, window):
                    self.refused = f"{kernel.__name__} is not exact for {list(heads[0].shape)}"
            except torch.OutOfMemoryError:
                raise
            # What a kernel does not know it refuses in a way of its own.
            except (RuntimeError, NotImplementedError, ValueError) as error:
                self.refused = f"{type(error).__name__}: {error}".splitlines()[0]
        return self.refused is None

    def make_mask(self, *arguments: Any, **options: Any) -> torch.Tensor | None:
        """The default's mask, or None where a kernel keeps joined rows apart; read nowhere on the host."""
        rows = self.rows
        shape = options.get("batch_size"), options.get("kv_length")
        if rows is not None and not rows.masked and shape == (1, rows.length):
            return None
        if not self.hides_padding:
            options["attention_mask"] = None
        return self._default_mask(*arguments, **options)

    def _bias(self, mask: torch.Tensor, rows: JoinedRows | None) -> torch.Tensor:
        """The mask as fp32 (B, 1, T, T) to add to scores; made once for blocks that are given the same mask."""
        if mask is not self._last_mask:
            padded = rows.split_mask(mask) if rows else mask
            least = torch.finfo(torch.float32).min
            boolean = padded.dtype == torch.bool
            self._last_bias = torch.zeros(padded.shape).masked_fill_(~padded, least) if boolean else padded.float()
            self._last_mask = mask
        return self._last_bias


@contextmanager
def row_attention() -> Iterator[AttentionRouter]:
    """Let models whose attention is transformers' "sdpa" take the kernels that are made for their rows."""
    # Under a name of its own, models that compare their configuration with "sdpa" would compute otherwise.
    default, default_mask = AttentionInterface()[SDPA], AttentionMaskInterface()[SDPA]
    router = AttentionRouter(default, default_mask)
    AttentionInterface.register(SDPA, router)
    AttentionMaskInterface.register(SDPA, router.make_mask)
    try:
        yield router
    finally:
        AttentionInterface.register(SDPA, default)
        AttentionMaskInterface.register(SDPA, default_mask)
