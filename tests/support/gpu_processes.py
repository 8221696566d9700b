"""Two processes that share weights and take the ways of GPUs: `torchrun -m tests.support.gpu_processes OUT`."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from llmtune.model.blocks import blocks
from tests.support.gpu_ways import adapted, answer_for_gpu, gaps, step

KINDS = ("llama", "lfm2")


def sharded_step(kind: str) -> tuple[list[torch.Tensor], list[str]]:
    """The loss and gradients of `step`, and the ways that were proved, with weights shared among processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def share(model: Any) -> Any:
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    results, joiner = step(adapted(kind, "lora"), ours=True, share=share)
    assert joiner is not None
    whole = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in results]
    return whole, [*joiner.ways]


def main(out: Path) -> None:
    """Write, for each kind of model, how far loss and gradients are from one process's, and the ways."""
    dist.init_process_group("gloo")
    answer_for_gpu(pytest.MonkeyPatch())
    found = {}
    for kind in KINDS:
        ours, ways = sharded_step(kind)
        found[kind] = [*gaps(ours, step(adapted(kind, "lora"), ours=False)[0]), ways]
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
