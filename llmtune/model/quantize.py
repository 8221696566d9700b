"""Loads a base with the linear layers that a plan never trains in 4 bits (NF4)."""

import torch
from bitsandbytes.nn import Linear4bit
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


def check_quantized(frozen: list[str]) -> None:
    """Raise FieldError where there is no linear layer to quantize."""
    if not frozen:
        raise FieldError(
            "model.quantize",
            "4bit is for linear layers that never train, and here every one does; "
            "add an adapter, or reach fewer blocks",
        )


def load_quantized(
    base: Base, linear: tuple[list[str], list[str]], dtype: torch.dtype, device: torch.device | None = None
) -> PreTrainedModel:
    """The base with the first list of linear layers in NF4 and all else in `dtype`; the second list has the others.

    `device` is as for `load_model`. Raises TrainingError where other layers than those are in NF4.
    """
    frozen, keep = linear
    model = load_model(base, dtype, keep, device)
    quantized = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    if quantized != set(frozen):
        odd = sorted(quantized ^ set(frozen))[0]
        raise TrainingError(f"{odd} is {'' if odd in quantized else 'not '}in 4 bits, against the plan")
    _unmap_weights(model)
    return model


def _unmap_weights(model: nn.Module) -> None:
    """Copy weights that are mapped from the base's file, on CPUs: one such tensor keeps the whole file in memory."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and type(parameter) is nn.Parameter:
            parameter.data = parameter.data.clone()
    trim_heap()
