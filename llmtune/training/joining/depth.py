"""The first blocks of a model, as many as show each kind of block that it has, and the states that they give."""

from typing import TypeAlias

import torch
from torch import nn

from llmtune.model.blocks import blocks, decoder

AT_LEAST = 2
"""Blocks that are run at the least: what passes between rows in a block may show in the next one."""
Settings: TypeAlias = dict[tuple[str, str], object]
"""The types of a block's modules, and their attributes that are numbers or texts, by module and attribute."""


class _ReachedError(Exception):
    """Ends a forward pass at a block, with the hidden states that it gives."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states


def blocks_to_run(model: nn.Module, first: int) -> int:
    """How many blocks have, from `first` on, two and one of every kind that is there."""
    kinds = _kinds([_settings(block) for block in blocks(model)])
    firsts = (kinds.index(kind, first) for kind in kinds[first:])
    return min(len(kinds), max([first + AT_LEAST, *(index + 1 for index in firsts)]))


def _kinds(settings: list[Settings]) -> list[Settings]:
    """The settings of each block, without those that are its own number in every block that has them."""
    places = {place for block in settings for place in block}
    numbers = {place for place in places if all(block.get(place, at) == at for at, block in enumerate(settings))}
    return [{place: value for place, value in block.items() if place not in numbers} for block in settings]


def _settings(block: nn.Module) -> Settings:
    simple = (bool, int, float, str, type(None))
    found: Settings = {}
    for name, module in block.named_modules():
        found[name, ""] = type(module)
        found |= {(name, key): value for key, value in vars(module).items() if isinstance(value, simple)}
    return found


def states_after(model: nn.Module, count: int, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The hidden states (B, T, H) that the first `count` blocks give; no later one is run.

    Where a block gives anything else, they are those of the whole decoder.
    """
    shape = inputs["input_ids"].shape

    def stop(module: nn.Module, arguments: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        states = output if isinstance(output, torch.Tensor) else output[0]
        if states.shape[:-1] == shape:
            raise _ReachedError(states)

    hook = blocks(model)[count - 1].register_forward_hook(stop)
    try:
        whole: torch.Tensor = decoder(model)(**inputs, use_cache=False)[0]
    except _ReachedError as reached:
        return reached.states
    finally:
        hook.remove()
    return whole
