"""Where the base of a run goes to be asked, and in which form: in whole, or in the few bits that it was trained in."""

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from llmtune.errors import FullMemoryError
from llmtune.launch.devices import launch_device
from llmtune.machine import processes
from llmtune.machine.device import free_bytes
from llmtune.machine.precision import computing_dtype
from llmtune.model.base import Base, build_skeleton, load_config, load_model, model_facts
from llmtune.model.files.quantization import dequantized_tensors, kept_bits
from llmtune.model.files.stored import StoredTensor, stored_tensors, weight_files
from llmtune.model.quantize import WEIGHT_BYTES, bits_of, load_quantized, split_linear_layers
from llmtune.numbers import size
from llmtune.recipe.sections import Recipe

ROOM = 2**30
"""Bytes that answering takes beside the weights, at the least."""
_STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Placement:
    """A device, the dtype of what computes there, and the bits of the base's linear layers where they are quantized."""

    device: torch.device
    dtype: torch.dtype
    bits: int | None = None
    """4 or 8; None where the base is in whole."""
    note: str = ""
    """Why the base is quantized, for people; empty where it is in whole."""


def place(recipe: Recipe, base: Base) -> Placement:
    """Choose device, dtype and form of a recipe's base, by what is free on the device.

    All processes must ask together: the one with the least room decides for all.
    Raises FullMemoryError, before any weight is read, for a base that does not fit in any form that the run allows.
    """
    device = launch_device(recipe.launch)
    dtype = computing_dtype(recipe.model.precision, device)
    stored = dequantized_tensors(stored_tensors(base.folder, base.name), base.name)
    free = min(processes.gather(free_bytes(device) // processes.sharing(device)))
    whole = _whole_bytes(base, stored, dtype, device)
    bits = bits_of(recipe.model.quantize)
    if whole + ROOM * (bits is not None) <= free:
        return Placement(device, dtype)
    width = f"{dtype.itemsize * 8} bits"
    if bits is None:
        raise FullMemoryError(_too_large(base, device, f"{size(whole)} in {width}", free))
    least = _quantized_bytes(recipe, base, stored, dtype, bits)
    if least > free:
        raise FullMemoryError(_too_large(base, device, f"{size(least)} in {bits} bits", free))
    needed = f"the base takes {size(whole)} in {width} and answers {size(ROOM)} more"
    note = (
        f"{needed}, and {size(free)} is free {_where(f'on {device}')}, so the {bits}-bit base of the training answers"
    )
    return Placement(device, dtype, bits, note)


def load_placed(base: Base, recipe: Recipe, placement: Placement) -> PreTrainedModel:
    """Load the base of a recipe where and in the form that a placement says."""
    if placement.bits:
        linear = linear_layers(recipe, build_skeleton(base))
        return load_quantized(base, linear, placement.dtype, placement.device, placement.bits)
    return load_model(base, placement.dtype, None, placement.device)


def linear_layers(recipe: Recipe, skeleton: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Names of the linear layers that a quantized run trains in few bits, and of the others."""
    plan = recipe.plan(model_facts(skeleton))
    return split_linear_layers(skeleton, plan, adapted=not recipe.method.adapter.trains_base)


def _whole_bytes(base: Base, stored: dict[str, StoredTensor], dtype: torch.dtype, device: torch.device) -> int:
    """Bytes that a base takes on a device; none on a CPU that computes in the files' dtype, which maps them."""
    if kept_bits(load_config(base)):
        return sum(file.stat().st_size for file in weight_files(base.folder, base.name))
    if device.type == "cpu" and all(tensor.dtype == _STORED[dtype] for tensor in stored.values()):
        return 0
    return sum(math.prod(tensor.shape) for tensor in stored.values()) * dtype.itemsize


def _quantized_bytes(recipe: Recipe, base: Base, stored: dict[str, StoredTensor], dtype: torch.dtype, bits: int) -> int:
    """Bytes of a base whose linear layers are in so many bits, as its recipe trains it."""
    numbers = sum(math.prod(tensor.shape) for tensor in stored.values())
    skeleton = build_skeleton(base)
    parameters = dict(skeleton.named_parameters())
    quantized = sum(parameters[f"{name}.weight"].numel() for name in linear_layers(recipe, skeleton)[0])
    return round(quantized * WEIGHT_BYTES[bits] + (numbers - quantized) * dtype.itemsize)


def _too_large(base: Base, device: torch.device, needed: str, free: int) -> str:
    place = "in memory" if device.type == "cpu" else f"on {device}"
    fewer = ", or add --set launch.processes=1" if processes.world() > 1 else ""
    remedy = (
        f"free some memory{fewer}" if device.type == "cpu" else "free some of it, or add --set launch.accelerate=cpu"
    )
    return f"{base.name} takes {needed}, and {size(free)} is free {_where(place)}; {remedy}"


def _where(place: str) -> str:
    """Say where so much is free: of several processes, that each has as much."""
    return f"for each of {processes.world()} processes" if processes.world() > 1 else place
