"""Whether the processes and the engine that `accelerate launch` set up can do what the recipe asks."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType

from llmtune.errors import LONGEST_LINE, FieldError, MachineError, TrainingError, first_line
from llmtune.launch.command import WORLD
from llmtune.launch.engine import check_kind, check_sharding
from llmtune.machine import processes
from llmtune.machine.device import free_bytes, run_device
from llmtune.machine.gpus import Card, card_notes, lacks_kernels
from llmtune.machine.precision import computing_dtype, gpu_has_bf16
from llmtune.recipe.sections import Recipe

_WORKSPACES = (":4096:8", ":16:8")
"""The values of CUBLAS_WORKSPACE_CONFIG with which cuBLAS gives the same bits each time."""


def join_processes() -> PartialState:
    """This process among those that were launched; the others wait for one that prepares a run or fills a cache."""
    if _enabled("ACCELERATE_USE_DEEPSPEED"):
        check_kind("DEEPSPEED", "the config that accelerate was started with")
    device = run_device()
    if device.type == "cuda" and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_nccl_available():
        raise MachineError(
            f"torch {torch.__version__} is built without NCCL, by which several GPUs communicate; "
            "set launch.accelerate: single_gpu, or install a build that has it"
        )
    state = PartialState(cpu=device.type == "cpu", timeout=processes.PATIENCE)
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
    check_device(recipe, state.device)


def check_device(recipe: Recipe, device: torch.device) -> None:
    """Raise MachineError where a device cannot compute as the recipe says, or torch has no code for it."""
    precision, on_gpu = recipe.model.precision, device.type == "cuda"
    if precision == "fp16" and not on_gpu:
        raise MachineError("model.precision: fp16 is for GPUs, and there is none; try auto, bf16 or fp32")
    if recipe.train.optimizer == "paged_adamw_8bit" and not on_gpu:
        raise MachineError("train.optimizer: paged_adamw_8bit pages GPU memory and finds no GPU; adamw_8bit needs none")
    if not on_gpu:
        return
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if message := lacks_kernels(name, capability, torch.cuda.get_arch_list()):
        raise MachineError(message)
    if precision == "bf16" and not gpu_has_bf16():
        raise MachineError(f"model.precision: {name} has no bf16; try auto, which takes fp16 there")


def describe_cards(recipe: Recipe, state: PartialState) -> list[str]:
    """Lines on GPUs that differ or that others use, for all processes, each of which must ask.

    Raises MachineError where the processes would compute in different data types.
    """
    if state.device.type != "cuda":
        return []
    properties = torch.cuda.get_device_properties(state.device)
    dtype = str(computing_dtype(recipe.model.precision, state.device)).removeprefix("torch.")
    card = Card(properties.name, properties.total_memory, free_bytes(state.device), dtype)
    return compare_cards(processes.gather(card))


def compare_cards(cards: list[Card]) -> list[str]:
    """`card_notes`; raises MachineError for GPUs that would compute in different data types."""
    dtypes = {card.dtype: card.name for card in cards}
    if len(dtypes) > 1:
        words = " and ".join(f"{name} in {dtype}" for dtype, name in sorted(dtypes.items()))
        raise MachineError(
            f"the GPUs would compute in different precisions, {words}; set model.precision: fp16 or fp32"
        )
    return card_notes(cards)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Let operations of torch and cuBLAS give the same bits each time inside the block, where `wanted`.

    Raises FieldError, with a training's exit code, for an operation that cannot. To be entered before the first product
    on a GPU.
    """
    if not wanted:
        yield
        return
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in _WORKSPACES:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = _WORKSPACES[0]
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic = True
    cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        message = f"{first_line(error)[:LONGEST_LINE]}; set it to false"
        raise FieldError("train.deterministic", message, TrainingError) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]


def _refuse_ignored_processes(state: PartialState) -> None:
    """Raise MachineError where `--num_processes` of `accelerate launch` was ignored: its config runs one process."""
    # Accelerate then sets the address of the first process, and no number of processes.
    left = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(os.environ)
    if state.num_processes == 1 and left and "WORLD_SIZE" not in os.environ:
        raise MachineError(
            "accelerate was asked for several processes and started one (MASTER_ADDR is set, WORLD_SIZE is not); "
            "launch with accelerate_configs/multi_cpu.yaml or ddp.yaml"
        )


def check_engine(recipe: Recipe, state: PartialState) -> None:
    """Raise an error where the engine that `accelerate launch` set up cannot do what the recipe says."""
    if not _enabled("ACCELERATE_USE_FSDP"):
        return
    names = [name for name in os.environ if name.startswith("FSDP_")]
    settings = {name.removeprefix("FSDP_").lower(): os.environ[name].lower() for name in names}
    check_sharding({"version": "1", **settings}, recipe.train.optimizer)
    if recipe.model.add_tokens:
        raise FieldError("model.add_tokens", "PEFT's rows of new tokens were not tried under fsdp2; try ddp")
    if state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise MachineError("fsdp2 shards over GPUs, and there is none; accelerate_configs/multi_cpu.yaml runs on CPUs")


def _enabled(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"
