"""Loads a base with the linear layers that a plan never trains in 4 bits (NF4) or in 8 (LLM.int8)."""

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmtune.errors import FieldError, TrainingError
from llmtune.machine.memory import trim_heap
from llmtune.model.base import Base, load_model
from llmtune.model.blocks import blocks, distances, renamed_by_peft
from llmtune.plan.stages import Plan

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight in 4 bits: its half byte, a byte for 64 of them, and 4 bytes for 256 of those."""
INT8_BYTES = 1 + 4 / 1024
"""Of a weight in 8 bits: its byte, and 4 bytes for a row, of some 1024."""
WEIGHT_BYTES = {4: NF4_BYTES, 8: INT8_BYTES}
LAYERS: dict[int, type[nn.Module]] = {4: Linear4bit, 8: Linear8bitLt}
"""The layers of bitsandbytes by the bits of their weights."""


def bits_of(quantize: str) -> int | None:
    """The bits that `model.quantize` means, None where it is none."""
    return None if quantize == "none" else int(quantize.removesuffix("bit"))


def split_linear_layers(skeleton: nn.Module, plan: Plan, adapted: bool) -> tuple[list[str], list[str]]:
    """Names of the linear layers to quantize, and of those to keep: outside the blocks, or trained.

    Where the model is `adapted`, none of its own layers trains; kept are those that PEFT adapts as tensors.
    """
    linear = [name for name, m in skeleton.named_modules() if isinstance(m, Conv1D) or type(m) is nn.Linear]
    inside = {id(module) for block in blocks(skeleton) for module in block.modules()}
    frozen = [name for name in linear if id(skeleton.get_submodule(name)) in inside]
    if adapted:
        tensors = set(renamed_by_peft(skeleton, frozen))
        frozen = [name for name in frozen if name not in tensors]
    else:
        distance = distances(skeleton)
        frozen = [name for name in frozen if plan.peak(distance[f"{name}.weight"]) == 0]
    return frozen, [name for name in linear if name not in set(frozen)]


def check_quantized(frozen: list[str], quantize: str) -> None:
    """Raise FieldError where there is no linear layer to quantize."""
    if not frozen:
        raise FieldError(
            "model.quantize",
            f"{quantize} is for linear layers that never train, and here every one does; "
            "add an adapter, or reach fewer blocks",
        )


def load_quantized(
    base: Base,
    linear: tuple[list[str], list[str]],
    dtype: torch.dtype,
    device: torch.device | None = None,
    bits: int = 4,
) -> PreTrainedModel:
    """The base with the first list of linear layers in 4 or 8 bits and all else in `dtype`; the others are the second.

    `device` is as for `load_model`. Raises TrainingError where other layers than those are in so few bits.
    """
    frozen, keep = linear
    model = load_model(base, dtype, keep, device, bits)
    quantized = {name for name, module in model.named_modules() if isinstance(module, LAYERS[bits])}
    if quantized != set(frozen):
        odd = sorted(quantized ^ set(frozen))[0]
        raise TrainingError(f"{odd} is {'' if odd in quantized else 'not '}in {bits} bits, against the plan")
    _unmap_weights(model)
    return model


def _unmap_weights(model: nn.Module) -> None:
    """Copy weights that are mapped from the base's file, on CPUs: one such tensor keeps the whole file in memory."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and type(parameter) is nn.Parameter:
            parameter.data = parameter.data.clone()
    trim_heap()
