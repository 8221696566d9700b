"""Optimizer groups by distance, what requires gradients at a step, and 32-bit states for embeddings."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from llmtune.errors import TrainingError
from llmtune.machine.memory import file_mappings, release_pages
from llmtune.plan.schedule import Schedule


def optimizer_groups(
    tensors: dict[str, nn.Parameter], distance: dict[str, int], weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups, one per distance and kind (matrices decay, vectors do not); together exactly `tensors`."""
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in tensors.items():
        key = (distance[name], parameter.ndim > 1)
        decay = weight_decay if key[1] else 0.0
        group = groups.setdefault(key, {"params": [], "lr": 1.0, "weight_decay": decay, "distance": key[0]})
        group["params"].append(parameter)
    listed = [parameter for group in groups.values() for parameter in group["params"]]
    if sorted(map(id, listed)) != sorted(map(id, tensors.values())):
        raise TrainingError("the optimizer's groups are no partition of what trains")
    return [groups[key] for key in sorted(groups)]


def hold_in_fp32(model: nn.Module, tensors: Iterable[nn.Parameter]) -> None:
    """Hold tensors of a model in fp32; the pages of a file that held them in 16 bits are not needed any more."""
    uses, mappings = Counter(parameter.data_ptr() for parameter in model.parameters()), file_mappings()
    for tensor in tensors:
        stored = tensor.data
        tensor.data = stored.float()
        address = stored.data_ptr()
        is_stale = tensor.data_ptr() != address and uses[address] == 1
        if is_stale and any(address in mapping for mapping in mappings):
            release_pages(stored)


def freeze_to_stage(tensors: dict[str, nn.Parameter], distance: dict[str, int], schedule: Schedule, step: int) -> None:
    """Let exactly the tensors require gradients that train at `step`."""
    for name, parameter in tensors.items():
        parameter.requires_grad_(schedule.trains(step, distance[name]))


def keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """Let an 8-bit optimizer of bitsandbytes hold the states of embeddings in 32 bits: in 8 bits they are unstable."""
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    manager.initialize()  # it is one for all optimizers of a process, and holds what an earlier training registered
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


def check_floating(tensors: dict[str, nn.Parameter]) -> None:
    """Raise TrainingError for a tensor that is to train but holds no floating-point numbers."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TrainingError(f"{name} should train but is quantized")


def check_grouped(tensors: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Raise TrainingError for a tensor that requires a gradient but is not in the optimizer."""
    grouped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, tensor in tensors.items():
        if tensor.requires_grad and id(tensor) not in grouped:
            raise TrainingError(f"{name} should train but is not in the optimizer")
