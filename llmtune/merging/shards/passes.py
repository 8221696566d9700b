"""A model runs on a few texts with one of its blocks in memory at a time; two such passes are compared."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from llmtune.errors import LlmtuneError, ProofError, lacks_memory
from llmtune.machine.memory import trim_heap
from llmtune.merging.compact import widened_units
from llmtune.merging.proof import logits
from llmtune.merging.shards.change import Change, Tuned
from llmtune.merging.shards.hollow import Weights
from llmtune.merging.shards.stored import UnsupportedError
from llmtune.model.blocks import blocks, unwrap

Finish: TypeAlias = Callable[[dict[str, nn.Parameter]], None]
"""Changes parameters in memory, given by name, after adapters were added to them."""


@dataclass
class Pass:
    """What a model computes on texts."""

    logits: torch.Tensor
    """(tokens of all texts, vocabulary)"""
    states: list[torch.Tensor]
    """The hidden states after each block."""
    idle: list[str] = field(default_factory=list)
    """The adapted layers that did not run."""


def run_pass(
    model: Tuned, weights: Weights, ids: list[list[int]], change: Change | None = None, finish: Finish | None = None
) -> Pass:
    """Run a model on texts, each part of it in memory while it computes, its adapters added by `change`.

    Raises UnsupportedError where a part reads the weights of another one.
    """
    states: list[torch.Tensor] = []
    ran: set[nn.Module] = set()

    def open_unit(unit: nn.Module) -> None:
        own = weights.fill(unit.parameters())
        ran.update(unit.modules())
        if change:
            change.add([unit])
        if finish:
            finish(own)

    def close_unit(unit: nn.Module) -> None:
        weights.empty(unit.parameters())
        if change:
            change.forget([unit])

    def keep(module: nn.Module, arguments: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        states.append((output[0] if isinstance(output, tuple) else output).float())

    hooks = [block.register_forward_hook(keep) for block in blocks(unwrap(model))]
    try:
        with widened_units(model, open_unit, close_unit):
            computed = logits(model, ids)
    except (RuntimeError, KeyError, AttributeError) as error:
        if isinstance(error, LlmtuneError) or lacks_memory(error):
            raise
        raise UnsupportedError(f"its blocks do not compute one by one ({type(error).__name__})") from error
    finally:
        for hook in hooks:
            hook.remove()
        trim_heap()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    return Pass(computed, states, [name for name, layer in layers.items() if layer not in ran])


def same_states(what: str, actual: Pass, expected: Pass, bound: tuple[float, float]) -> None:
    """Raise ProofError with the first block after which two passes differ by more than the bound.

    `bound` is absolute, and a share of the largest number; the larger one counts.
    """
    for number, (one, other) in enumerate(zip(actual.states, expected.states, strict=True)):
        gap = float((one - other).abs().max())
        limit = max(bound[0], bound[1] * float(other.abs().max()))
        if not gap <= limit:
            raise ProofError(
                f"{what} moved hidden states after block {number} by {gap:.3g}, over the bound of {limit:.3g}; "
                "nothing was merged"
            )
