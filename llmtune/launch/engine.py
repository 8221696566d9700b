"""What llmtune can follow of an accelerate config: its kind of launch, and FSDP2's settings."""

from collections.abc import Mapping
from typing import Any

from llmtune.errors import FieldError
from llmtune.recipe.sections import Recipe

KEY = "launch.accelerate"
_KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
_DEFAULTS = {"version": "1", "cpu_ram_efficient_loading": "true", "activation_checkpointing": "false"}
"""What `accelerate launch` takes where a config's fsdp_config lacks a key."""
_UNSHARDABLE = {
    "cpu_ram_efficient_loading": "set it to false: every process reads the base",
    "activation_checkpointing": "set it to false, and train.activation_checkpointing to true",
}
_STATEFUL = ("adamw", "sgd")
"""The optimizers whose states can be sharded."""
_FILLED = 0.9
"""The share of a GPU that states may take; the activations of the smallest pass come on top."""


def check_kind(kind: str, name: str) -> None:
    """Raise FieldError for a distributed_type that llmtune does not run, such as DeepSpeed's."""
    if kind == "DEEPSPEED":
        raise FieldError(KEY, f"{name} is a config of DeepSpeed, which cannot follow a plan; try fsdp2")
    if kind not in _KINDS:
        raise FieldError(KEY, f"{name}: distributed_type {kind!r} is not supported; try one of {', '.join(_KINDS)}")


def check_config(config: Mapping[str, Any], optimizer: str) -> None:
    """Raise FieldError where an accelerate config shards in a way that llmtune, or this optimizer, cannot follow."""
    if config["distributed_type"] != "FSDP":
        return
    section = config.get("fsdp_config")
    keys = section if isinstance(section, Mapping) else {}
    settings = {name: str(keys.get(f"fsdp_{name}", default)).lower() for name, default in _DEFAULTS.items()}
    check_sharding(settings, optimizer)


def check_sharding(settings: Mapping[str, str], optimizer: str) -> None:
    """Raise FieldError for settings of FSDP, by name without the prefix, that a training cannot follow."""
    if settings["version"] != "2":
        raise FieldError(KEY, "FSDP1 is not supported; try fsdp2 (fsdp_version: 2)")
    if optimizer not in _STATEFUL:
        raise FieldError("train.optimizer", f"{optimizer} cannot hold its state sharded under fsdp2; try adamw")
    for name, instead in _UNSHARDABLE.items():
        if settings.get(name) == "true":
            raise FieldError(KEY, f"fsdp_{name}: true is not supported under fsdp2; {instead}")


def needs_sharding(recipe: Recipe, states: int, gpu: int) -> bool:
    """Whether auto shards a recipe: where a GPU of so many bytes has no room for the states, and sharding makes some.

    `states` are the bytes of weights, gradients and the optimizer's states. What is in 4 bits is not sharded.
    """
    helps = recipe.train.optimizer in _STATEFUL and recipe.model.quantize == "none"
    return recipe.launch.is_open and helps and states > _FILLED * gpu
