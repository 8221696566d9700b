"""Where the base of a run goes to be asked, and in which form: in whole, or in the 4 bits that it was trained in."""

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from llmtune.errors import FullMemoryError
from llmtune.launch.devices import launch_device
from llmtune.machine.device import free_bytes
from llmtune.machine.precision import computing_dtype
from llmtune.model.base import Base, build_skeleton, load_config, load_model, model_facts
from llmtune.model.files.quantization import dequantized_tensors, kept_bits
from llmtune.model.files.stored import StoredTensor, stored_tensors, weight_files
from llmtune.model.quantize import NF4_BYTES, load_quantized, split_linear_layers
from llmtune.numbers import size
from llmtune.recipe.sections import Recipe

ROOM = 2**30
"""Bytes that answering takes beside the weights, at the least."""
_STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Placement:
    """A device, the dtype of what computes there, and whether the base's linear layers are in 4 bits."""

    device: torch.device
    dtype: torch.dtype
    is_4bit: bool
    note: str = ""
    """Why the base is in 4 bits, for people; empty where it is in whole."""


def place(recipe: Recipe, base: Base) -> Placement:
    """Choose device, dtype and form of a recipe's base, by what is free on the device.

    Raises FullMemoryError, before any weight is read, for a base that does not fit in any form that the run allows.
    """
    device = launch_device(recipe.launch)
    dtype = computing_dtype(recipe.model.precision, device)
    stored = dequantized_tensors(stored_tensors(base.folder, base.name), base.name)
    free = free_bytes(device)
    whole = _whole_bytes(base, stored, dtype, device)
    may_be_4bit = recipe.model.quantize == "4bit"
    if whole + ROOM * may_be_4bit <= free:
        return Placement(device, dtype, is_4bit=False)
    width = f"{dtype.itemsize * 8} bits"
    if not may_be_4bit:
        raise FullMemoryError(_too_large(base, device, f"{size(whole)} in {width}", free))
    least = _4bit_bytes(recipe, base, stored, dtype)
    if least > free:
        raise FullMemoryError(_too_large(base, device, f"{size(least)} in 4 bits", free))
    needed = f"the base takes {size(whole)} in {width} and answers {size(ROOM)} more"
    note = f"{needed}, and {size(free)} is free on {device}, so the 4-bit base of the training answers"
    return Placement(device, dtype, is_4bit=True, note=note)


def load_placed(base: Base, recipe: Recipe, placement: Placement) -> PreTrainedModel:
    """Load the base of a recipe where and in the form that a placement says."""
    if placement.is_4bit:
        linear = linear_layers(recipe, build_skeleton(base))
        return load_quantized(base, linear, placement.dtype, placement.device)
    return load_model(base, placement.dtype, None, placement.device)


def linear_layers(recipe: Recipe, skeleton: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Names of the linear layers that a 4-bit run trains in 4 bits, and of the others."""
    plan = recipe.plan(model_facts(skeleton))
    return split_linear_layers(skeleton, plan, adapted=not recipe.method.adapter.trains_base)


def _whole_bytes(base: Base, stored: dict[str, StoredTensor], dtype: torch.dtype, device: torch.device) -> int:
    """Bytes that a base takes on a device; none on a CPU that computes in the files' dtype, which maps them."""
    if kept_bits(load_config(base)):
        return sum(file.stat().st_size for file in weight_files(base.folder, base.name))
    if device.type == "cpu" and all(tensor.dtype == _STORED[dtype] for tensor in stored.values()):
        return 0
    return sum(math.prod(tensor.shape) for tensor in stored.values()) * dtype.itemsize


def _4bit_bytes(recipe: Recipe, base: Base, stored: dict[str, StoredTensor], dtype: torch.dtype) -> int:
    """Bytes of a base whose linear layers are in 4 bits as its recipe trains it."""
    numbers = sum(math.prod(tensor.shape) for tensor in stored.values())
    skeleton = build_skeleton(base)
    parameters = dict(skeleton.named_parameters())
    quantized = sum(parameters[f"{name}.weight"].numel() for name in linear_layers(recipe, skeleton)[0])
    return round(quantized * NF4_BYTES + (numbers - quantized) * dtype.itemsize)


def _too_large(base: Base, device: torch.device, needed: str, free: int) -> str:
    place = "in memory" if device.type == "cpu" else f"on {device}"
    remedy = "free some memory" if device.type == "cpu" else "free some of it, or add --set launch.accelerate=cpu"
    return f"{base.name} takes {needed}, and {size(free)} is free {place}; {remedy}"
