"""The optimizer's states: which checkpoints hold them, how they are sharded, and when they are dropped."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from llmtune.errors import TrainingError
from llmtune.model.sharded import gather, shard_like
from llmtune.training.checkpoint import checkpoint_step

OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"


def has_states(checkpoint: Path, steps: int) -> bool:
    """Whether a checkpoint holds the optimizer's states, which one after the last of all `steps` does not.

    Raises TrainingError where steps would follow one without.
    """
    if (checkpoint / OPTIMIZER).is_file():
        return True
    step = checkpoint_step(checkpoint)
    if step < steps:
        message = f"was the last one of a training of {step} steps, without the optimizer's states"
        raise TrainingError(f"{checkpoint}: {message}; {steps} steps need a new run")
    return False


def save_sharded_optimizer(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, folder: Path, first: bool
) -> None:
    """Write the state of an optimizer of sharded parameters with whole tensors: the `first` process, though all ask."""
    stored = optimizer.state_dict()
    for place, state in stored["state"].items():
        stored["state"][place] = {key: _on_first(value, first) for key, value in state.items()}
    if first:
        torch.save(stored, folder / OPTIMIZER)
        torch.save(scheduler.state_dict(), folder / SCHEDULER)


def _on_first(value: object, first: bool) -> object:
    """The full tensor of a state, in memory of the host, in the `first` process alone; what is no tensor as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    full = gather(value)
    return full.cpu() if first else None


def load_sharded_optimizer(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, checkpoint: Path
) -> None:
    """Read what `save_sharded_optimizer` wrote into an optimizer of sharded parameters, and its scheduler."""
    # Mapped: the processes of a machine share the file's pages, and each copies its shards alone.
    stored = torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, state in stored["state"].items():
        like = parameters[place]
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                # A copy: the file stays on disk for as long as a tensor is mapped from it.
                state[key] = shard_like(like, value) if value.shape == like.shape else value.clone()
    optimizer.load_state_dict(stored)
    scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER, weights_only=True))


def drop_states(optimizer: torch.optim.Optimizer, tensors: Iterable[nn.Parameter]) -> None:
    """Drop the optimizer's states of the tensors that are frozen now, which frees their memory."""
    for tensor in tensors:
        if not tensor.requires_grad:
            optimizer.state.pop(tensor, None)
