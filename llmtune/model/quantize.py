"""4-bit for whatever never trains: which linear layers of a plan that is, and a base loaded so."""

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmtune.errors import TrainingError
from llmtune.memory import trim_heap
from llmtune.model.base import Base, build_skeleton, load_model
from llmtune.model.blocks import blocks, distances
from llmtune.plan.stages import Plan
from llmtune.recipe.sections import Recipe


def split_linear_layers(skeleton: nn.Module, recipe: Recipe, plan: Plan) -> tuple[list[str], list[str]]:
    """Names of the linear layers that go to NF4 and of those that stay: outside the blocks, or trained themselves."""
    linear = [name for name, m in skeleton.named_modules() if isinstance(m, Conv1D) or type(m) is nn.Linear]
    inside = {id(module) for block in blocks(skeleton) for module in block.modules()}
    never = [name for name in linear if id(skeleton.get_submodule(name)) in inside]
    if recipe.method.adapter.kind == "none":
        distance = distances(skeleton)
        never = [name for name in never if plan.peak(distance[f"{name}.weight"]) == 0]
    return never, [name for name in linear if name not in set(never)]


def count_quantized(skeleton: nn.Module, recipe: Recipe, plan: Plan) -> int:
    """How many layers the recipe puts into NF4; raises RecipeError where it asks for that and there is none."""
    if recipe.model.quantize == "none":
        return 0
    count = len(split_linear_layers(skeleton, recipe, plan)[0])
    if not count:
        said = (
            "4bit is for linear layers that never train, and here every one does; add an adapter, or reach fewer blocks"
        )
        raise recipe.error("model.quantize", said)
    return count


def load_quantized(base: Base, recipe: Recipe, plan: Plan, dtype: torch.dtype) -> PreTrainedModel:
    """The base with what the recipe quantises in NF4 and all else in `dtype`; raises TrainingError for another set."""
    if recipe.model.quantize == "none":
        return load_model(base, dtype)
    never, keep = split_linear_layers(build_skeleton(base), recipe, plan)
    loaded: Any = load_model(base, dtype, keep)
    found = {name for name, module in loaded.named_modules() if isinstance(module, Linear4bit)}
    if found != set(never):
        odd = sorted(found ^ set(never))[0]
        raise TrainingError(f"{odd} is {'' if odd in found else 'not '}in 4 bits, against the plan")
    _let_go_of_the_file(loaded)
    return loaded


def _let_go_of_the_file(loaded: nn.Module) -> None:
    """Keep none of what was read to be quantised, on CPUs: one tensor that is still mapped holds the whole file."""
    for parameter in loaded.parameters():
        if parameter.device.type == "cpu" and type(parameter) is nn.Parameter:
            parameter.data = parameter.data.clone()
    trim_heap()
