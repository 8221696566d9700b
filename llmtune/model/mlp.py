"""Finds the MLP of every transformer block by structure, and widens it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

from llmtune.model.blocks import blocks

WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "ffn_intermediate_size")
"""The keys of configurations for the MLP's inner width."""

LinearLayer: TypeAlias = nn.Linear | Conv1D
_HINT = "; bottleneck adapters need one MLP of linear layers per block, the same in all; try the adapter lora"
_ACTIVATIONS = tuple({entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()})


@dataclass(frozen=True, eq=False)
class InputLayer:
    """A linear layer from hidden to inner features: gate, up, or both in one."""

    layer: LinearLayer
    parts: tuple[str, ...]
    """"gate" and "up", as many of them as the layer computes, in the order of its outputs."""


@dataclass(frozen=True, eq=False)
class Mlp:
    """A block's MLP: down(act(gate(x)) * up(x)) or down(act(up(x))) with an inner width of `width`."""

    name: str
    """The module that an adapter wraps: the one that has the layers or, where that is the block, the layer down."""
    inputs: tuple[InputLayer, ...]
    down: LinearLayer
    act: nn.Module
    width: int


def features(layer: LinearLayer) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)


def mlps(model: PreTrainedModel) -> list[Mlp]:
    """The MLP of every block, first block first; raises ValueError where a block has not one made of linear layers."""
    hidden = model.config.get_text_config().hidden_size
    names = {id(module): name for name, module in model.named_modules()}
    every = [_find(block, hidden, names) for block in blocks(model)]
    widths = {mlp.width for mlp in every}
    if len(widths) > 1:
        raise ValueError(f"{type(model).__name__} has MLPs of different widths {sorted(widths)}{_HINT}")
    return every


def _find(block: nn.Module, hidden: int, names: dict[int, str]) -> Mlp:
    holders = [m for m in block.modules() if any(isinstance(child, _ACTIVATIONS) for child in m.children())]
    if len(holders) != 1:
        raise ValueError(f"{names[id(block)]} ({type(block).__name__}) holds {len(holders)} activations{_HINT}")
    holder = holders[0]
    linear = [child for child in holder.children() if isinstance(child, nn.Linear | Conv1D)]
    act = next(child for child in holder.children() if isinstance(child, _ACTIVATIONS))
    downs = [layer for layer in linear if features(layer)[1] == hidden != features(layer)[0]]
    ups = [layer for layer in linear if layer not in downs]
    shown = f"{names[id(holder)]} ({type(holder).__name__})"
    width = features(downs[0])[0] if len(downs) == 1 else 0
    outs = [features(layer)[1] for layer in ups if features(layer)[0] == hidden]
    if len(outs) != len(ups) or outs not in ([width], [width, width], [2 * width]):
        shapes = ", ".join(" -> ".join(map(str, features(layer))) for layer in linear) or "none"
        raise ValueError(f"{shown} is no MLP over {hidden} features (its linear layers: {shapes}){_HINT}")
    if holder is block:
        if outs != [width]:
            raise ValueError(f"{shown} holds a gated MLP's layers itself{_HINT}")
        return Mlp(names[id(downs[0])], (InputLayer(ups[0], ("up",)),), downs[0], act, width)
    return Mlp(names[id(holder)], _input_layers(holder, ups, downs[0], act, width, shown), downs[0], act, width)


def _input_layers(
    holder: nn.Module, ups: list[LinearLayer], down: LinearLayer, act: nn.Module, width: int, shown: str
) -> tuple[InputLayer, ...]:
    """Which layer computes gate and which up, read from one token's pass; raises ValueError for another form."""
    seen = _trace_token(holder, ups, [act, down])
    if len(ups) == 2:
        gate, up = sorted(ups, key=lambda layer: seen[layer] is not seen[act])
        parts = [seen[gate], seen[up]]
        inputs: tuple[InputLayer, ...] = (InputLayer(gate, ("gate",)), InputLayer(up, ("up",)))
    elif features(ups[0])[1] == width:
        parts, inputs = [seen[ups[0]]], (InputLayer(ups[0], ("up",)),)
    else:
        order = ("gate", "up") if seen[act].storage_offset() == 0 else ("up", "gate")
        halves = dict(zip(order, seen[ups[0]].chunk(2, dim=-1), strict=True))
        parts, inputs = [halves["gate"], halves["up"]], (InputLayer(ups[0], order),)
    inner = act(parts[0]) * parts[1] if len(parts) == 2 else act(parts[0])
    if not inner.is_meta and not bool((inner - seen[down]).abs().max() <= 1e-2 * seen[down].abs().max()):
        raise ValueError(f"{shown} is neither down(act(gate(x)) * up(x)) nor down(act(up(x))){_HINT}")
    return inputs


def _trace_token(
    holder: nn.Module, outputs_of: Sequence[LinearLayer], inputs_of: Sequence[nn.Module]
) -> dict[nn.Module, torch.Tensor]:
    """Outputs of some modules in an MLP, and first inputs of others, while it runs on one token."""
    seen: dict[nn.Module, torch.Tensor] = {}
    hooks = [layer.register_forward_hook(lambda module, _, out: seen.update({module: out})) for layer in outputs_of]
    for module in inputs_of:
        hooks.append(module.register_forward_pre_hook(lambda module, inputs: seen.update({module: inputs[0]})))
    first = outputs_of[0]
    weight, training = first.weight, {module: module.training for module in holder.modules()}
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    token = torch.linspace(-1, 1, features(first)[0], device=weight.device, dtype=dtype).view(1, 1, -1)
    holder.eval()
    # A 4-bit layer that runs in evaluation mode on a CPU is repacked for good, and no gradient passes it any more.
    for layer in (module for module in training if isinstance(module, nn.Linear)):
        layer.train()
    with torch.no_grad():
        holder(token)
    for module, flag in training.items():
        module.training = flag
    for hook in hooks:
        hook.remove()
    return seen


def width_key(model: PreTrainedModel, width: int) -> str:
    """The configuration's key for the MLP's inner width; raises ValueError where none has the value `width`."""
    config = model.config.get_text_config()
    for key in WIDTHS:
        if hasattr(config, key) and getattr(config, key) in (width, None):
            return key
    raise ValueError(
        f"no key of {type(config).__name__} says that MLPs are {width} wide, so a parallel bottleneck could not be "
        "merged; try form: sequential, or the adapter lora"
    )


def with_widths(content: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """The content of a config.json with the inner width that `model`'s MLPs have."""
    text = model.config.get_text_config()
    widths = {key: getattr(text, key) for key in WIDTHS if getattr(text, key, None) is not None}
    parts = [key for key in model.config.sub_configs if getattr(model.config, key, None) is text]
    return content | ({key: content.get(key, {}) | widths for key in parts} or widths)


def widen(
    model: PreTrainedModel, every: list[Mlp], pieces: Mapping[str, Mapping[str, nn.Linear]], size: int
) -> PreTrainedModel:
    """The model with each MLP `size` wider: by the layers in `pieces` under its name, else by zeros.

    Raises ValueError for quantized weights, weights that are not finite, and a configuration without a width.
    """
    key = width_key(model, every[0].width)
    layers = [layer for mlp in every for layer in (mlp.down, *(part.layer for part in mlp.inputs))]
    if any(not layer.weight.dtype.is_floating_point for layer in layers):
        raise ValueError("an adapter is merged into a 16- or 32-bit base only; load the base without quantization")
    if not all(p.isfinite().all() for part in pieces.values() for layer in part.values() for p in layer.parameters()):
        raise ValueError("the adapter's weights are not finite")
    with torch.no_grad():
        for mlp in every:
            widen_mlp(mlp, pieces.get(mlp.name, {}), size)
    setattr(model.config.get_text_config(), key, every[0].width + size)
    with torch.device("meta"):
        stock = type(model)(model.config)
    expected = {name: tensor.shape for name, tensor in stock.state_dict().items()}
    odd = [name for name, tensor in model.state_dict().items() if tensor.shape != expected.get(name)]
    if odd:
        raise ValueError(f"{key}: {every[0].width + size} is not what widens {odd[0]} of {type(model).__name__}")
    return model


def widen_mlp(mlp: Mlp, pieces: Mapping[str, nn.Linear], size: int) -> None:
    """Make one MLP `size` wider, by the layers in `pieces`, else by zeros; its parameters stay the same objects."""
    for layer, parts in ((part.layer, part.parts) for part in mlp.inputs):
        weights, biases = [], []
        weight = _weight(layer)
        for index, part in enumerate(parts):
            piece = pieces.get(part)
            rows = weight.new_zeros(size, weight.shape[1]) if piece is None else piece.weight.to(weight)
            weights += [weight.chunk(len(parts))[index], rows]
            if layer.bias is not None:
                more = layer.bias.new_zeros(size) if piece is None else piece.bias.to(layer.bias)
                biases += [layer.bias.chunk(len(parts))[index], more]
        _replace(layer, torch.cat(weights), torch.cat(biases) if biases else None)
    weight, piece = _weight(mlp.down), pieces.get("down")
    columns = weight.new_zeros(weight.shape[0], size) if piece is None else piece.weight.to(weight)
    bias = mlp.down.bias if piece is None or piece.bias is None else mlp.down.bias + piece.bias.to(mlp.down.bias)
    _replace(mlp.down, torch.cat([weight, columns], dim=1), bias)


def _weight(layer: LinearLayer) -> torch.Tensor:
    """The weight as (outputs, inputs)."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def _replace(layer: LinearLayer, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    layer.weight.data = (weight.T if isinstance(layer, Conv1D) else weight).contiguous()
    if bias is not None:
        layer.bias.data = bias
    set_features(layer, weight.shape[1], weight.shape[0])


def set_features(layer: LinearLayer, inputs: int, outputs: int) -> None:
    """Say how many inputs and outputs a linear layer has."""
    if isinstance(layer, Conv1D):
        layer.nx, layer.nf = inputs, outputs
    else:
        layer.in_features, layer.out_features = inputs, outputs
