"""Gathers and shards weights that FSDP2 splits over processes."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded one, for which every process must call this; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(like: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Shard a full tensor as `like` is; any tensor as it is where `like` is not sharded."""
    if not isinstance(like, DTensor):
        return tensor
    # Every process has the full tensor, so nothing is sent.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


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
