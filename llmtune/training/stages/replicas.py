"""Replicas of a model whose gradients DDP averages: exactly those of what trains in a stage."""

from typing import Any

from torch.nn.parallel import DistributedDataParallel


def rewrap(replicas: DistributedDataParallel, options: dict[str, Any]) -> None:
    """Make a DDP wrapper anew, in place, over the parameters that require a gradient now; `options` are DDP's.

    What required one before has no buffer any more, and nothing is sent for it. No weights are sent.
    """
    # In place, since the training loop holds this object; its old hooks and buffers go with the reducer it replaces.
    DistributedDataParallel.__init__(
        replicas,
        replicas.module,
        device_ids=replicas.device_ids,
        output_device=replicas.output_device,
        init_sync=False,
        **options,
    )
