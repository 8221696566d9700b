"""The `train` section: the training loop."""

from typing import Annotated, Literal

from pydantic import Field

from llmtune.fields import Closed, Count, Share
from llmtune.plan.schedule import Over, Shape


class Train(Closed):
    """The training loop."""

    epochs: Annotated[float, Field(gt=0)] = 2
    """Passes over the data."""
    max_steps: Count | None = None
    """Optimizer steps, so many exactly, whatever epochs says: rows come again, or are not all seen."""
    batch_size: Count = 16
    """Rows per optimizer step, over all processes."""
    micro_batch_size: Count | None = None
    """Rows per forward pass and process, at most; where not given, no limit on GPUs, and at most 8 on CPUs."""
    micro_batch_tokens: Count | None = None
    """Tokens per forward pass and process, at most, with padding; a longer row is a pass of its own. Where not given,
    as many as fit into free memory. Neither limit changes the result."""
    warmup: Share = 0.05
    """Share of the steps over which the learning rate of a newly trained group rises."""
    schedule: Shape = "cosine"
    """How learning rates fall toward the end of training."""
    schedule_over: Over = "run"
    """Whether warm-up and schedule span the whole run, or start anew with each stage of the plan."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"] = "adamw"
    """8-bit states take a quarter of AdamW's memory; paged states move to the CPU when a GPU is full; Adafactor's are
    factored; sgd has no momentum. All of them use the plan's learning rates."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, on matrices only."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient."""
    group_by_length: bool = True
    """Rows of similar length share an optimizer step, which saves padding; false draws rows at random."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of initialization, row order and dropout: 32 bits."""
    activation_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time. auto: where memory is short."""
    deterministic: bool = False
    """Use only GPU operations that give the same bits each time, some of them slower. CPUs always do."""
    save_every: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the steps after which a checkpoint is saved, again and again."""
    keep: Count = 2
    """How many of the newest checkpoints are kept."""
    keep_best: bool | Literal["loss", "score"] = False
    """Whether the delta is the best checkpoint and not the last: by validation loss (true, loss), or by the score of
    answers to eval.rows validation rows (score)."""
    patience: Count | None = None
    """Validations without improvement after which training ends, in the last stage alone; needs keep_best."""
