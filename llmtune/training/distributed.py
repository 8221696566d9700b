"""Whether the processes and the engine that `accelerate launch` set up can do what the recipe asks."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from llmtune.errors import FieldError, MachineError
from llmtune.launch.command import WORLD
from llmtune.machine import processes
from llmtune.model.base import computes_bf16
from llmtune.plan.stages import Plan
from llmtune.recipe.sections import Recipe

_UNSHARDABLE = {
    "cpu_ram_efficient_loading": "set it to false: every process reads the base",
    "activation_checkpointing": "set it to false, and train.activation_checkpointing to true",
}


def join_processes() -> PartialState:
    """This process among those that were launched; the others wait for one that prepares a run or fills a cache."""
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=processes.PATIENCE)
    processes.join()
    return state


def check_world(recipe: Recipe, state: PartialState) -> None:
    """Raise MachineError where the launcher started another number of processes than requested."""
    requested = os.environ.get(WORLD)
    expected = int(requested) if requested else recipe.launch.processes
    if expected is not None and expected != state.num_processes:
        raise MachineError(
            f"{expected} processes were asked for and {state.num_processes} started; "
            "launch with accelerate_configs/multi_cpu.yaml or ddp.yaml, or set launch.processes"
        )
    if requested is None:
        _refuse_ignored_processes(state)
    if state.num_processes > 1:
        backend = "gloo" if state.device.type == "cpu" else "nccl"
        if backend not in (state.backend or ""):
            raise MachineError(f"the processes communicate by {state.backend}, not by {backend}")
    if computes_bf16(recipe.model.precision) and state.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise MachineError("this GPU has no bf16; set model.precision to fp32")
    if recipe.train.optimizer == "paged_adamw_8bit" and state.device.type != "cuda":
        raise MachineError("train.optimizer: paged_adamw_8bit pages GPU memory and finds no GPU; adamw_8bit needs none")


def _refuse_ignored_processes(state: PartialState) -> None:
    """Raise MachineError where `--num_processes` of `accelerate launch` was ignored: its config runs one process."""
    # Accelerate then sets the address of the first process, and no number of processes.
    left = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(os.environ)
    if state.num_processes == 1 and left and "WORLD_SIZE" not in os.environ:
        raise MachineError(
            "accelerate was asked for several processes and started one (MASTER_ADDR is set, WORLD_SIZE is not); "
            "launch with accelerate_configs/multi_cpu.yaml or ddp.yaml"
        )


def check_engine(recipe: Recipe, plan: Plan, state: PartialState) -> None:
    """Raise an error where the engine that `accelerate launch` set up cannot do what the recipe says."""
    if _enabled("ACCELERATE_USE_DEEPSPEED"):
        check_stages(plan)
    if not _enabled("ACCELERATE_USE_FSDP"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise FieldError("launch.accelerate", "FSDP1 is not supported; try fsdp2 (fsdp_version: 2)")
    check_sharded(recipe.train.optimizer)
    for key, instead in _UNSHARDABLE.items():
        if _enabled(f"FSDP_{key.upper()}"):
            raise FieldError("launch.accelerate", f"fsdp_{key}: true is not supported under fsdp2; {instead}")
    if state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise MachineError("fsdp2 shards over GPUs, and there is none; accelerate_configs/multi_cpu.yaml runs on CPUs")


def check_stages(plan: Plan) -> None:
    """Raise FieldError for stages, which DeepSpeed does not follow."""
    if plan.staged:
        raise FieldError("launch.accelerate", "DeepSpeed cannot follow stages; try ddp or fsdp2")


def check_sharded(optimizer: str) -> None:
    """Raise FieldError for an optimizer that cannot hold the state of sharded weights."""
    if optimizer not in ("adamw", "sgd"):
        message = f"{optimizer} cannot hold its state sharded under fsdp2; try adamw"
        raise FieldError("train.optimizer", message)


def _enabled(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"
