"""Which linear layers an adapter can go to: those that their module calls, and that return a linear layer's output."""

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmtune.adapters.targets.experts import routers
from llmtune.model.blocks import blocks, renamed_by_peft
from llmtune.model.mlp import features

ROUTER = "a router"
RENAMED = "PEFT takes its name for the weights of experts"


def linear_layers(model: nn.Module) -> dict[str, str | None]:
    """The linear layers inside the blocks by name, and why an adapter cannot go to them; None where it can."""
    inside = {id(module) for block in blocks(model) for module in block.modules()}
    linear = [each for each in _linear(model) if id(each[3]) in inside]
    times = Counter(id(layer.get_parameter("weight")) for _, _, _, layer in linear)
    layers = {name: _obstacle(owner, leaf, layer) for name, owner, leaf, layer in linear}
    shared = [name for name, _, _, layer in linear if times[id(layer.get_parameter("weight"))] > 1]
    layers |= dict.fromkeys(shared, "several blocks share its weight")
    layers |= dict.fromkeys(layers.keys() & routers(model).keys(), ROUTER)
    renamed = renamed_by_peft(model, [name for name, obstacle in layers.items() if obstacle is None])
    return layers | dict.fromkeys(renamed, RENAMED)


def _linear(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """The linear layers of a model: full name, the module that has it, the name there, and the layer."""
    seen: set[int] = set()
    for path, owner in model.named_modules():
        for leaf, layer in owner.named_children():
            if isinstance(layer, nn.Linear | Conv1D) and id(layer) not in seen:
                seen.add(id(layer))
                yield (f"{path}.{leaf}" if path else leaf), owner, leaf, layer


def _obstacle(owner: nn.Module, leaf: str, layer: nn.Module) -> str | None:
    kind: type = type(owner)
    if leaf in _read_weights(kind):
        return f"{kind.__name__} reads its weight without calling it"
    if _passes_no_gradient(kind):
        return f"{kind.__name__} passes no gradient"
    if not _returns_features(layer):
        return f"a {type(layer).__name__} returns more than a linear layer does"
    return None


@cache
def _passes_no_gradient(kind: type) -> bool:
    """Whether a module computes without gradients, as those that choose which tokens to attend to."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return False
    return re.search(r"@torch\.(no_grad|inference_mode)(\(\))?\s+def forward\b", source) is not None


@cache
def _read_weights(kind: type) -> frozenset[str]:
    """The attributes of a module whose weight its code uses by itself, as fused kernels do, not by calling them.

    What only asks for a weight's precision, device or shape does not count, nor does what sets its first values, nor
    slices, which stand for tensor parallelism.
    """
    try:
        lines = inspect.getsource(kind).splitlines()
    except (OSError, TypeError):
        return frozenset()
    uses = [line for line in lines if "init." not in line and "isinstance(" not in line]
    pattern = re.compile(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape)\b|\[)")
    return frozenset(name for line in uses for name in pattern.findall(line))


@torch.no_grad()
def _returns_features(layer: nn.Module) -> bool:
    """Whether a layer of a class of its own returns one tensor of its output features."""
    # A layer in 4 bits that runs in evaluation mode on a CPU is repacked for good.
    if type(layer) in (nn.Linear, Conv1D) or not layer.get_parameter("weight").is_floating_point():
        return True
    inputs, outputs = features(layer)
    weight = layer.get_parameter("weight")
    try:
        output = layer(torch.zeros(1, 2, inputs, dtype=weight.dtype, device=weight.device))
    # Such a class may want other inputs and fail in a way of its own.
    except Exception:
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, 2, outputs)
