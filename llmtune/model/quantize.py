"""4-bit for whatever never trains: which linear layers of a plan that is, and a base loaded so."""

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmtune.errors import FieldError, TrainingError
from llmtune.memory import trim_heap
from llmtune.model.base import Base, load_model
from llmtune.model.blocks import blocks, distances
from llmtune.plan.stages import Plan


def split_linear_layers(skeleton: nn.Module, plan: Plan, adapted: bool) -> tuple[list[str], list[str]]:
    """Names of the linear layers that go to NF4 and of those that stay: outside the blocks, or trained themselves.

    Where the model is `adapted`, none of its own layers trains.
    """
    linear = [name for name, m in skeleton.named_modules() if isinstance(m, Conv1D) or type(m) is nn.Linear]
    inside = {id(module) for block in blocks(skeleton) for module in block.modules()}
    never = [name for name in linear if id(skeleton.get_submodule(name)) in inside]
    if not adapted:
        distance = distances(skeleton)
        never = [name for name in never if plan.peak(distance[f"{name}.weight"]) == 0]
    return never, [name for name in linear if name not in set(never)]


def check_quantized(never: list[str]) -> None:
    """Raise FieldError where no linear layer is left to put into 4 bits."""
    if not never:
        said = (
            "4bit is for linear layers that never train, and here every one does; add an adapter, or reach fewer blocks"
        )
        raise FieldError("model.quantize", said)


def load_quantized(base: Base, linear: tuple[list[str], list[str]], dtype: torch.dtype) -> PreTrainedModel:
    """The base with the first list of linear layers in NF4 and all else in `dtype`; the second list names the others.

    Raises TrainingError where other layers than those are in NF4.
    """
    never, keep = linear
    loaded: Any = load_model(base, dtype, keep)
    found = {name for name, module in loaded.named_modules() if isinstance(module, Linear4bit)}
    if found != set(never):
        odd = sorted(found ^ set(never))[0]
        raise TrainingError(f"{odd} is {'' if odd in found else 'not '}in 4 bits, against the plan")
    _let_go_of_the_file(loaded)
    return loaded


def _let_go_of_the_file(loaded: nn.Module) -> None:
    """Keep none of what was read to be quantized, on CPUs: one tensor that is still mapped holds the whole file."""
    for parameter in loaded.parameters():
        if parameter.device.type == "cpu" and type(parameter) is nn.Parameter:
            parameter.data = parameter.data.clone()
    trim_heap()
