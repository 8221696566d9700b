"""Which linear layers an adapter goes to: inside the blocks, where a plan trains, and named so."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmtune.adapters.targets.adaptable import RENAMED, linear_layers
from llmtune.adapters.targets.experts import expert_obstacle, expert_tensors
from llmtune.errors import FieldError, nearest
from llmtune.model.blocks import blocks, distances
from llmtune.plan.stages import Plan


def choose_targets(
    model: nn.Module,
    plan: Plan,
    targets: str | tuple[str, ...],
    near: set[int] | None = None,
    tensors: bool = False,
) -> list[str]:
    """Return the full names of the linear layers to adapt, in blocks that the plan ever trains.

    `targets` are names, or all-linear; `near` are distances to keep to. With `tensors`, the names of tensors are among
    them: those of experts, and the weights of layers that PEFT would take for experts. Raises FieldError for a name
    without a match.
    """
    trained = _trained_layers(model, plan, near, tensors)
    if isinstance(targets, str):
        return trained
    for target in targets:
        if not any(_matches(name, target) for name in trained):
            raise FieldError("method.adapter.targets", _explain_no_match(target, model, trained))
    return [name for name in trained if any(_matches(name, target) for target in targets)]


def linear_names(model: nn.Module) -> list[str]:
    """Return the last names of the linear layers inside the blocks, sorted."""
    inside = [pair for block in blocks(model) for pair in block.named_modules()]
    return sorted({name.rsplit(".", 1)[-1] for name, module in inside if isinstance(module, nn.Linear | Conv1D)})


def _obstacles(model: nn.Module, tensors: bool) -> dict[str, str | None]:
    """Return what adapters might go to, and why they cannot."""
    obstacles = linear_layers(model)
    if not tensors:
        return obstacles
    weights = {f"{name}.weight": None for name, obstacle in obstacles.items() if obstacle == RENAMED}
    named = {name: obstacle for name, obstacle in obstacles.items() if f"{name}.weight" not in weights}
    return named | weights | {name: expert_obstacle(model, name) for name in expert_tensors(model)}


def _trained_layers(model: nn.Module, plan: Plan, near: set[int] | None, tensors: bool) -> list[str]:
    """Return the linear layers inside blocks that the plan trains, at the distances `near` where given."""
    distance, obstacles = distances(model), _obstacles(model, tensors)
    linear = [name for name, obstacle in obstacles.items() if obstacle is None]
    if not linear:
        raise FieldError("method.adapter.targets", _explain_nothing(model, obstacles))
    far = {name: distance[name if name in distance else f"{name}.weight"] for name in linear}
    reached = [name for name in linear if plan.peak(far[name]) > 0]
    if not reached:
        raise FieldError("method", "trains no block, so no adapter would train; try reach 1")
    trained = [name for name in reached if near is None or far[name] in near]
    if not trained:
        farthest = max(far[name] for name in reached)
        raise FieldError("method.adapter.layers", f"names no block that trains; the plan reaches distance {farthest}")
    return trained


def _explain_nothing(model: nn.Module, obstacles: dict[str, str | None]) -> str:
    """Return why no layer can be adapted, and what the blocks are made of."""
    if obstacles:
        reasons = sorted({f"{name.rsplit('.', 1)[-1]} ({why})" for name, why in obstacles.items()})
        return f"no linear layer can be adapted: {', '.join(reasons)}; train without an adapter"
    modules = [module for block in blocks(model) for module in block.modules()]
    kinds = sorted({type(m).__name__ for m in modules if any(True for _ in m.parameters(recurse=False))})
    return f"the blocks have no linear layer but {', '.join(kinds)}; train without an adapter"


def _matches(name: str, target: str) -> bool:
    name = name.removesuffix(".weight")
    return name == target or name.endswith(f".{target}")


def _explain_no_match(target: str, model: nn.Module, trained: list[str]) -> str:
    """Return what a target is that is no linear layer that trains, and the nearest name that is one."""
    ends = sorted({name.removesuffix(".weight").rsplit(".", 1)[-1] for name in trained})
    others = [module for name, module in model.named_modules() if _matches(name, target)]
    hint = nearest(target, ends) or f"; this model has {', '.join(ends)}"
    if others and not isinstance(others[0], nn.Linear | Conv1D):
        return f"{target!r} is a {type(others[0]).__name__}, and adapters go to linear layers{hint}"
    obstacle = next((why for name, why in linear_layers(model).items() if why and _matches(name, target)), None)
    if obstacle:
        return f"{target!r} cannot be adapted: {obstacle}{hint}"
    if any(_matches(name, target) for name in expert_tensors(model)):
        return f"{target!r} is one tensor for all experts, which the adapter lora alone adapts{hint}"
    if others and target == "lm_head":
        return f"{target!r} is the head, which adapters leave alone; it trains without an adapter, where it is untied"
    return f"{target!r} matches no linear layer that trains{hint}"
