"""Frees the weights of blocks that never run again, since their outputs are cached."""

from collections.abc import Sequence

from torch import nn
from torch.distributed.fsdp import FSDPModule

from llmtune.machine.memory import release_pages
from llmtune.model.sharded import free_shards


def free_weights(blocks: Sequence[nn.Module], floor: int) -> int:
    """Free the weights of the blocks below `floor`, whose parameters are empty then; returns their bytes.

    Of a sharded model, the bytes of this process.
    """
    if isinstance(blocks[0], FSDPModule):
        return sum(free_shards(block) for block in blocks[:floor])
    freed = 0
    needed = {parameter.data_ptr() for block in blocks[floor:] for parameter in block.parameters()}
    for parameter in (parameter for block in blocks[:floor] for parameter in block.parameters()):
        # Quantized weights are small and of their own class; shared ones are still needed.
        if type(parameter) is not nn.Parameter or parameter.data_ptr() in needed:
            continue
        release_pages(parameter.data)
        freed += parameter.numel() * parameter.element_size()
        parameter.data = parameter.data.new_empty(0)
    return freed
