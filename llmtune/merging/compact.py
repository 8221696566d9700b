"""A model that stays in the dtype of its files and computes in fp32: each block is widened while it runs.

The process that reads a merged folder runs this file's text, so it imports nothing of llmtune.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

Auto = type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]
"""What loads a model."""
Change = Callable[[int, torch.Tensor], None]
"""Changes a widened parameter in place; it is told by its number in the model."""


def units(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts that are widened as one, which hold every parameter: blocks, embeddings, norms, the head."""
    if isinstance(module, nn.ModuleList):
        yield from module
    elif hasattr(module, "base_layer") or any(True for _ in module.parameters(recurse=False)):
        yield module
    else:
        for child in module.children():
            yield from units(child)


@contextlib.contextmanager
def widened_units(
    model: nn.Module, open_unit: Callable[[nn.Module], None], close_unit: Callable[[nn.Module], None]
) -> Iterator[None]:
    """Call the functions before and after each unit of a model runs."""
    hooks = []
    for unit in units(model):
        hooks.append(unit.register_forward_pre_hook(lambda module, arguments: open_unit(module)))
        hooks.append(unit.register_forward_hook(lambda module, arguments, output: close_unit(module)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def in_fp32(model: nn.Module, change: Change | None = None) -> Iterator[None]:
    """Let a model compute in fp32 inside the block, each of its units on a copy that is dropped after it has run."""
    numbers = {parameter: number for number, parameter in enumerate(model.parameters())}
    narrow: dict[nn.Parameter, torch.Tensor] = {}

    def widen(unit: nn.Module) -> None:
        for parameter in unit.parameters():
            narrow[parameter] = parameter.data
            parameter.data = parameter.data.to(torch.float32, copy=change is not None)
            if change:
                change(numbers[parameter], parameter.data)

    def restore(unit: nn.Module) -> None:
        for parameter in unit.parameters():
            if parameter in narrow:
                parameter.data = narrow.pop(parameter)

    try:
        with widened_units(model, widen, restore):
            yield
    finally:
        restore(model)


def widen_buffers(model: PreTrainedModel, auto: Auto) -> PreTrainedModel:
    """Put a model's floating-point buffers into fp32: what no file holds is made anew, as its dtype rounded it."""
    with init_empty_weights(include_buffers=False):
        twin = auto.from_config(model.config, dtype=torch.float32, trust_remote_code=False)
    stored, anew = set(model.state_dict()), dict(twin.named_buffers())
    for module_name, module in model.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            key = f"{module_name}.{name}" if module_name else name
            if buffer.is_floating_point():
                setattr(module, name, buffer.float() if key in stored else anew[key].to(torch.float32))
    return model
