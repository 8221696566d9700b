"""Experts that a model keeps as one tensor for all of them, and the routers that choose among them."""

import inspect
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from llmtune.model.blocks import blocks, text_model

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def expert_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The tensors inside the blocks that hold a matrix for each expert, by name."""
    counts = _counts(model)
    inside = _modules_inside(model) if counts else ()
    return {f"{path}.{leaf}": tensor for path, module in inside for leaf, tensor in _stacked(module, counts)}


def expert_obstacle(model: nn.Module, name: str) -> str | None:
    """Why an adapter cannot go to a tensor of experts; None where their module alone reads it, when it is called."""
    if not model.get_parameter(name).is_floating_point():
        return "its values are quantized"
    path, _, leaf = name.rpartition(".")
    above, _, attribute = path.rpartition(".")
    owner: Any = type(model.get_submodule(above))
    return f"{owner.__name__} reads it without calling its module" if (attribute, leaf) in _reads(owner) else None


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with a matrix that choose among experts, or weigh the shared ones, by name.

    They stand beside the experts, and the last of them has an output for each expert, or one output in all.
    """
    counts = _counts(model)
    # Some have an output more, for no expert at all, or for the shared ones.
    outputs = {1, sum(counts)} | counts | {count + 1 for count in counts}
    by_name: dict[str, nn.Module] = {}
    for path, module in _modules_inside(model) if counts else ():
        children = dict(module.named_children())
        experts = {name for name, child in children.items() if any(True for _ in _stacked(child, counts))}
        for name in children.keys() - experts if experts else ():
            matrices = {f"{path}.{name}.{inner}".rstrip("."): each for inner, each in _matrices(children[name])}
            if matrices and list(matrices.values())[-1].get_parameter("weight").shape[0] in outputs:
                by_name |= matrices
    return by_name


def _counts(model: nn.Module) -> set[int]:
    """How many experts there are, routed and shared, by the configuration."""
    settings = text_model(model).config.to_dict()
    keys = [key for key in settings if "experts" in key and "_per_" not in key]
    return {settings[key] for key in keys if type(settings[key]) is int and settings[key] > 1}


def _modules_inside(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules inside the blocks, and their names."""
    inside = {id(module) for block in blocks(model) for module in block.modules()}
    return [(path, module) for path, module in model.named_modules() if id(module) in inside]


def _stacked(module: nn.Module, counts: set[int]) -> Iterator[tuple[str, nn.Parameter]]:
    """The tensors of a module itself that hold a matrix for each expert."""
    for leaf, tensor in module.named_parameters(recurse=False):
        if tensor.ndim == 3 and tensor.shape[0] in counts and not isinstance(module, _CONVOLUTIONS):
            yield leaf, tensor


def _matrices(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules in one, itself included, whose weight is a matrix."""
    for name, each in module.named_modules():
        weight = dict(each.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.ndim == 2:
            yield name, each


@cache
def _reads(kind: type) -> frozenset[tuple[str, str]]:
    """What a module's code reads of its children, as (child, attribute), calls aside."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return frozenset()
    return frozenset(re.findall(r"\bself\.(\w+)\.(\w+)\b(?!\()", source))
