"""What makes a step on CPUs fast and small, each part equal to the plain way."""

from typing import Any

from llmtune.casting import cast_where_used, sparse_lookup
from llmtune.lowrank import one_operation
from llmtune.recompute import lean_mlps, lean_norms


def install(model: Any, args: Any) -> None:
    """Let a model's layers compute what they do now in fewer passes and with less kept, for a Trainer's `args`."""
    one_operation(model)
    lean_norms(model)
    if not args.gradient_checkpointing:
        lean_mlps(model)
    if args.bf16:
        cast_where_used(model)
    # Across processes gradients are averaged in buffers that are laid out for dense ones.
    if args.world_size == 1:
        sparse_lookup(model)
