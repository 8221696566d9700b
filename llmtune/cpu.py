"""What makes a step on CPUs fast and small, each part equal to the plain way."""

from typing import Any

from llmtune.casting import Held, cast_where_used, sparse_lookup
from llmtune.lowrank import one_operation
from llmtune.recompute import lean_mlps, lean_norms


def install(model: Any, args: Any) -> Held:
    """Let a model's layers compute what they do now in fewer passes and with less kept, for a Trainer's `args`.

    Gives the gradients that are to be added after each backward pass.
    """
    held = Held()
    one_operation(model)
    lean_norms(model)
    if not args.gradient_checkpointing:
        lean_mlps(model)
    # Across processes gradients are averaged as they come, in buffers that are laid out for dense ones.
    alone = args.world_size == 1
    if args.bf16:
        cast_where_used(model, held if alone else None)
    if alone:
        sparse_lookup(model)
    return held
