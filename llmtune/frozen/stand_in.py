"""A model's decoder over rows of token ids, whose blocks compute, return what is given, or pass on what they get."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from llmtune.frozen.store import StoredOutputs, longest_first
from llmtune.model.blocks import blocks, unwrap

Layout = Callable[[torch.Tensor], torch.Tensor]
"""What makes of states (B, T, H) those that a model is to go on from."""
TOKENS = {"cpu": 2048, "cuda": 16384}


class StubbedDecoder:
    """The part of a model below its head; what stands in for a block leaves masks and positions to the model."""

    def __init__(self, model: nn.Module, rows: Sequence[list[int]], autocast: Callable[[], Any]) -> None:
        self.inner: Any = unwrap(model)
        self.blocks: list[nn.Module] = list(blocks(model))
        self.lengths = [len(row) for row in rows]
        self.entry: set[int] = set()
        self.width, self.dtype = 0, torch.float32
        self._rows, self._autocast = rows, autocast
        self._given: torch.Tensor | None = None
        self._rest: tuple[None, ...] | None = None

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        device: torch.device = next(self.inner.parameters()).device
        return device

    @property
    def whole(self) -> bool:
        """Whether the model computes in fp32."""
        with self._autocast():
            mixed = torch.is_autocast_enabled(self.device.type)
        return not mixed and all(parameter.dtype == torch.float32 for parameter in self.inner.parameters())

    def arrange(self, given: int = 0, through: int | None = None) -> None:
        """Let the blocks below `given` return what is given, those from `through` on what they get; others compute."""
        for index, block in enumerate(self.blocks):
            passes = through is not None and index >= through
            _replace(block, self._give if index < given else self._through if passes else None)

    def give(
        self, kept: StoredOutputs, rows: Sequence[int], tokens: int, device: torch.device, lay: Layout | None = None
    ) -> None:
        """Let stand-ins return the kept states of these rows, padded to so many tokens, laid out as `lay` says."""
        given = kept.read(rows, tokens).to(device, non_blocking=True)
        self._given = lay(given) if lay else given

    def look(self, first: bool) -> str | None:
        """Learn from the shortest row what a block returns, from the `first` alone or with all others computing.

        Gives a reason where that cannot be stood in for. `entry` are then the parameters that work below the blocks.
        """
        seen: list[Any] = []
        inside = {id(module) for block in self.blocks for module in block.modules()}
        outside = [module for module in self.inner.modules() if id(module) not in inside]

        def enters(module: nn.Module, arguments: Any, output: Any) -> None:
            if not seen:
                self.entry |= {id(parameter) for parameter in module.parameters(recurse=False)}

        def returns(module: nn.Module, arguments: Any, output: Any) -> None:
            seen.append(output)
            if isinstance(output, tuple):
                # What else a block returns, attention weights, is asked for by nobody here; the probe sees where it is.
                self._rest = (None,) * (len(output) - 1)

        handles = [module.register_forward_hook(enters) for module in outside]
        handles += [self.blocks[0].register_forward_hook(returns)]
        self.arrange(0, 1 if first else None)
        self.forward([min(range(len(self._rows)), key=self.lengths.__getitem__)])
        self.arrange()
        for handle in handles:
            handle.remove()
        output = seen[0] if len(seen) == 1 else None
        hidden = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3:
            return "this model's blocks do not return hidden states alone"
        self.width, self.dtype = hidden.shape[-1], hidden.dtype
        return None

    def batches(self) -> Iterator[list[int]]:
        """Rows, longest first, in batches of a size that suits the device."""
        most = TOKENS.get(self.device.type, TOKENS["cpu"])
        order = longest_first(self.lengths)
        while order:
            count = max(1, most // self.lengths[order[0]])
            yield order[:count]
            del order[:count]

    @torch.no_grad()
    def forward(self, rows: Sequence[int], kept: StoredOutputs | None = None) -> torch.Tensor:
        """The last hidden states (B, T, H) of rows, padded on the right, for evaluation; stand-ins return `kept`."""
        device = self.device
        lengths = [self.lengths[row] for row in rows]
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : lengths[place]] = torch.tensor(self._rows[row])
            mask[place, : lengths[place]] = 1
        if kept is not None:
            self.give(kept, rows, max(lengths), device)
        training = self.inner.training
        self.inner.eval()
        with self._autocast():
            decoder: Any = self.inner.base_model
            hidden = decoder(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)[0]
        self.inner.train(training)
        result: torch.Tensor = hidden.float() * mask[..., None].to(device)
        return result

    def _give(self, *arguments: Any, **named: Any) -> Any:
        return self._given if self._rest is None else (self._given, *self._rest)

    def _through(self, *arguments: Any, **named: Any) -> Any:
        hidden = arguments[0] if arguments else named["hidden_states"]
        return hidden if self._rest is None else (hidden, *self._rest)


def _replace(block: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Let a block compute by `forward`, or by its own again."""
    if forward is None:
        vars(block).pop("forward", None)
    else:
        vars(block)["forward"] = forward
