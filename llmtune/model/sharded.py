"""Weights that FSDP2 shards over processes: the whole of them, and back."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that is sharded over processes, each of which has to ask; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(like: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A whole tensor sharded as `like` is, where `like` is sharded."""
    if not isinstance(like, DTensor):
        return tensor
    # Every process holds the whole, so nothing needs to be sent.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Let every process hold its own share again after a forward pass that no backward pass followed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def warm_up_dtypes(model: nn.Module) -> None:
    """Run a first pass while everything that will ever train requires a gradient, since FSDP2 settles dtypes in it."""
    model.eval()
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)
    reshard(model)
    model.train()
