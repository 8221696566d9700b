"""Gathers and shards weights that FSDP2 splits over processes."""

import os
from collections.abc import Iterable
from dataclasses import replace

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard
from torch.utils import swap_tensors

from llmtune.model.blocks import decoder, unwrap


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded one, for which every process must call this; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_to_host(tensors: dict[str, nn.Parameter], first: bool) -> dict[str, torch.Tensor]:
    """Full copies in fp32 in memory of the host, in the `first` process alone, though every process must call this."""
    copies = {}
    for name, tensor in tensors.items():
        full = gather(tensor.detach())
        if first:
            copies[name] = full.cpu().float().contiguous()
    return copies


def shard_like(like: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of this process's shard of a full tensor, sharded as `like` is; any tensor as it is if `like` is not.

    Only the shard is read and moved to the device: `tensor` may be mapped from a file.
    """
    if not isinstance(like, DTensor):
        return tensor
    local, mesh = tensor, like.device_mesh
    for index, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            parts, mine = local.chunk(mesh.size(index), placement.dim), mesh.get_local_rank(index)
            local = parts[mine] if mine < len(parts) else local.narrow(placement.dim, 0, 0)
    local = local.to(like.device, copy=True).contiguous()
    return DTensor.from_local(local, mesh, like.placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def is_sharded_run() -> bool:
    """Whether `accelerate launch` asked for FSDP: the base is then loaded to the host, and shards alone to the GPU."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def prepare_to_shard(model: nn.Module, plugin: FullyShardedDataParallelPlugin) -> None:
    """Have a model sharded in the precision it is loaded in, and its gradients summed in fp32, as DDP sums them.

    Accelerate would make whole fp32 copies of what requires a gradient, and sum in bf16.
    """
    model.requires_grad_(False)
    if isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)


@torch.no_grad()
def raise_to_fp32(tensors: Iterable[nn.Parameter]) -> None:
    """Let sharded parameters require a gradient and hold fp32; before the first forward pass, which fixes dtypes.

    A parameter stays the same object, so the optimizer keeps it.
    """
    for tensor in tensors:
        if tensor.dtype != torch.float32:
            swap_tensors(tensor, nn.Parameter(tensor.detach().float()))  # type: ignore[no-untyped-call]
        tensor.requires_grad_(True)


def free_shards(block: nn.Module) -> int:
    """Free the shards of a block that never runs again, whose parameters are empty then; returns their bytes."""
    freed = 0
    for name, parameter in list(block.named_parameters()):
        if not isinstance(parameter, DTensor):
            continue
        storage = parameter.to_local().untyped_storage()
        freed += storage.nbytes()
        storage.resize_(0)
        module, _, leaf = name.rpartition(".")
        empty = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        setattr(block.get_submodule(module), leaf, nn.Parameter(empty, requires_grad=False))
    return freed


def states_of_sharded(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The last hidden states (B, T, H), normed, from a pass through a sharded model, of which no part can run alone."""
    # `logits_to_keep` in place of a hook on the head would cut the states of some decoders.
    below_head, head = decoder(model), unwrap(model).get_output_embeddings()
    outputs: list[torch.Tensor] = []
    with (
        below_head.register_forward_hook(lambda module, arguments, output: outputs.append(output[0])),
        head.register_forward_pre_hook(lambda module, arguments: arguments[0][:, :1]),
    ):
        model(**inputs, use_cache=False)
    return outputs[0]


def reshard(model: nn.Module) -> None:
    """Free the gathered weights that a forward pass without a backward pass leaves on every process."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def warm_up_dtypes(model: nn.Module) -> None:
    """Run a first forward pass, in which FSDP2 fixes dtypes; all that will ever train must require a gradient."""
    model.eval()
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)
    reshard(model)
    model.train()
