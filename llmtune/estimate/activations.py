"""What a forward pass keeps for the backward pass, measured on the model itself without its weights."""

import copy
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from llmtune.estimate.autocast import MetaAutocast, TooManyCalls, change_tensors
from llmtune.estimate.live import fold_on_meta, folded_shapes, working_bytes
from llmtune.estimate.trace import BlockTrace, Trace, extended, rough_trace
from llmtune.kernels.lora import patch_lora, skip_input_casts
from llmtune.kernels.recompute import PARTS, patch_mlps, patch_norms
from llmtune.model.blocks import blocks, unwrap
from llmtune.model.trace import MetaChoices

_PROBE = 15
"""Tokens of the pass that tells whether a model computes token by token."""
_CALLS_A_TOKEN = 12
"""Calls per block and token from which a model is taken to loop over tokens."""
_CALLS_A_BLOCK = 600
"""Calls per block up to which a pass goes on to its end; blocks with adapters that loop over nothing make up to 300."""
_Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and options of a call."""


@dataclass
class _Saved:
    """Tensors that autograd saves, by storage: those of each block, and those outside the blocks (-1)."""

    ignored: set[int]
    weights: set[tuple[int, ...]]
    """Shapes of what trains: a saved tensor of such a shape is a copy in another precision."""
    folded: set[tuple[int, ...]]
    """Shapes of weights that an adapter is added to before they compute: a saved tensor of such a shape is that sum."""
    place: int = -1
    sums: dict[int, tuple[torch.UntypedStorage, int]] = field(default_factory=dict)
    copies: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    storages: dict[int, tuple[torch.UntypedStorage, int]] = field(default_factory=dict)
    inputs: dict[int, tuple[torch.UntypedStorage, int]] = field(default_factory=dict)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Note a tensor that is saved."""
        storage = tensor.untyped_storage()
        if id(storage) in self.ignored:
            return tensor
        if tuple(tensor.shape) in self.weights:
            self.copies[id(storage)] = storage
        elif tuple(tensor.shape) in self.folded:
            self.sums.setdefault(id(storage), (storage, self.place))
        else:
            self.storages.setdefault(id(storage), (storage, self.place))
        return tensor

    def enter(self, index: int, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Note that a block begins, and its input."""
        self.place = index
        change_tensors((arguments, options), self._give)

    def _give(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self.ignored:
            self.inputs.setdefault(id(storage), (storage, self.place))
        return tensor

    def leave(self, *_: object) -> None:
        """Note that a block ends."""
        self.place = -1

    def sum(self, place: int) -> int:
        """Bytes saved in a block, -1 for outside."""
        return sum(storage.nbytes() for storage, at in self.storages.values() if at == place)

    def added(self, place: int) -> int:
        """Bytes of the weights in a block that an adapter was added to."""
        return sum(storage.nbytes() for storage, at in self.sums.values() if at == place)

    def block(self, index: int) -> BlockTrace:
        """What a block saved, and of what it was given what no block before it was."""
        given = {key: storage.nbytes() for key, (storage, at) in self.inputs.items() if at == index}
        outside = {key for key, (_, at) in self.storages.items() if at == -1}
        inner = sum(
            storage.nbytes() for key, (storage, at) in self.storages.items() if at == index and key not in self.inputs
        )
        return BlockTrace(self.sum(index), sum(size for key, size in given.items() if key not in outside), inner)


def as_trained(model: nn.Module, trains: Collection[str], ever: Collection[str], dtype: torch.dtype) -> nn.Module:
    """A copy of a model whose tensors `trains` require gradients; `ever` are in fp32, all others in `dtype`."""
    tuned = copy.deepcopy(model).train()
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(torch.float32 if name in ever else dtype)
        parameter.requires_grad_(name in trains)
    unwrap(tuned).disable_input_require_grads()
    if dtype != torch.float32:
        skip_input_casts(tuned)
    patch_lora(tuned)
    patch_norms(tuned)
    fold_on_meta(tuned)
    return tuned


def trace(model: nn.Module, tokens: int, dtype: torch.dtype, kind: str) -> Trace:
    """What a pass of one row of `tokens` keeps, from a model of `as_trained` that computes in `dtype` on such a device.

    A model that loops over tokens is measured on a few of them. `tokens` should be odd: what has the shape of a weight
    or of its transpose is taken for its gradient.
    """
    try:
        return _measured(model, tokens, dtype, kind)
    # Any model may ask a tensor without content for its values, in a way of its own.
    except Exception:
        return rough_trace(model, tokens, dtype)


def _measured(model: nn.Module, tokens: int, dtype: torch.dtype, kind: str) -> Trace:
    run, many = partial(_run, model, dtype=dtype, kind=kind), _CALLS_A_TOKEN * _PROBE * len(blocks(model))
    if tokens > 2 * _PROBE + 1:
        with suppress(TooManyCalls):
            return run(tokens, most=_CALLS_A_BLOCK * len(blocks(model)))[0]
        few = run(_PROBE)
        if few[1] > many:
            more = run(2 * _PROBE + 1)
            if more[1] > 1.5 * few[1]:
                return extended(few[0], more[0], tokens)
    return run(tokens)[0]


def _run(model: nn.Module, tokens: int, dtype: torch.dtype, kind: str, most: int | None = None) -> tuple[Trace, int]:
    """The trace of a pass, and how many functions of torch it called; raises TooManyCalls for more than `most`."""
    listed = list(blocks(model))
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    known = [*model.parameters(), *model.buffers(), ids]
    ignored = {id(tensor.untyped_storage()) for tensor in known}
    saved = _Saved(ignored, weight_shapes(model), folded_shapes(model))
    cast = MetaAutocast(None if dtype == torch.float32 else dtype, kind, most)
    captured: dict[int, _Call] = {}
    with ExitStack() as stack, torch.random.fork_rng(devices=[]):
        for index, block in enumerate(listed):
            keep: Callable[..., None] = partial(_capture, captured, index)
            for hook in (partial(saved.enter, index), keep):
                stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(saved.leave).remove)
        stack.enter_context(cast)
        stack.enter_context(MetaChoices())
        stack.enter_context(saved_tensors_hooks(saved.pack, lambda tensor: tensor))
        stack.callback(head_of(model).register_forward_pre_hook(one_position).remove)
        unwrap(model)(input_ids=ids, use_cache=False)
    for tensor in cast.casts.values():
        saved.copies[id(tensor.untyped_storage())] = tensor.untyped_storage()
    for key in (*saved.copies, *saved.sums):
        saved.storages.pop(key, None)
    width = dtype.itemsize * tokens
    parts = [replace(saved.block(index), spared=width * _spared(block)) for index, block in enumerate(listed)]
    casts = sum(storage.nbytes() for storage in saved.copies.values())
    calls = cast.calls
    largest = max(range(len(parts)), key=lambda index: parts[index].saved)
    working = 0
    if parts[largest].saved:
        working = working_bytes(listed[largest], *captured[largest], MetaAutocast(cast.dtype, kind))
    folded = [saved.added(index) for index in range(len(listed))]
    spared = _spared_casts(model, cast.casts)
    return Trace(tokens, parts, saved.sum(-1), casts, working, cast.products, False, folded, spared), calls


def _spared_casts(model: nn.Module, casts: dict[int, torch.Tensor]) -> int:
    """Bytes of the casts of linear layers' weights, but for one of each shape: a buffer that all of a shape share."""
    linear = {id(module.weight) for module in model.modules() if type(module) is nn.Linear}
    copies = [cast for key, cast in casts.items() if key in linear]
    return sum(cast.nbytes for cast in copies) - sum({tuple(cast.shape): cast.nbytes for cast in copies}.values())


def _spared(block: nn.Module) -> int:
    """Features a token of gated MLPs that are computed again, not kept, where there is no checkpointing."""
    patch_mlps(block)
    features = 0
    for mlp in (module for module in block.modules() if {name for name, _ in module.named_children()} == set(PARTS)):
        if vars(mlp).pop("forward", None) is None:
            continue
        down = mlp.get_submodule("down_proj")
        features += getattr(down, "in_features", 0) * (1 + any(p.requires_grad for p in down.parameters()))
    return features


def _capture(
    captured: dict[int, _Call], index: int, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    captured[index] = (arguments, options)


def weight_shapes(model: nn.Module) -> set[tuple[int, ...]]:
    """The shapes of the matrices that train in a model, and of their transposes."""
    shapes = (tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad)
    matrices = (shape for shape in shapes if len(shape) > 1 and min(shape) > 1)
    return {one for shape in matrices for one in (shape, shape[::-1])}


def head_of(model: nn.Module) -> nn.Module:
    """The head of a model."""
    head: nn.Module = unwrap(model).get_output_embeddings()
    return head


def one_position(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Let the head compute on a copy of the first position: it is counted apart, on supervised positions alone."""
    return arguments[0][:, :1].clone()
