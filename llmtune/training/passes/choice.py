"""How large the passes of a run are: as before in a resumed run, else as the recipe says and free memory allows."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from llmtune.data.batches.passes import PassLimits, rows_per_pass
from llmtune.data.example import Example
from llmtune.data.findings import Findings
from llmtune.data.mixture import source_notes
from llmtune.data.store.encoded import lengths_of
from llmtune.errors import FieldError
from llmtune.estimate.memory import forecast
from llmtune.estimate.passes import choose_pass_size, copies_fit, setting_of
from llmtune.files import read_json
from llmtune.machine import processes
from llmtune.machine.device import free_bytes
from llmtune.model.layout import Layout
from llmtune.recipe.sections import Recipe, Train
from llmtune.run_log import Record
from llmtune.training.checkpoint import OBJECTIVE
from llmtune.training.plan_table import rows_per_process


@dataclass(frozen=True)
class RunPasses:
    """The passes of a run, the same in all its processes and from its first step to its last."""

    limits: PassLimits
    checkpointing: bool
    """Whether activations are recomputed in the backward pass."""
    line: str = ""
    """What to say of it; empty where there is nothing to say."""
    copies: bool = False
    """Whether CPUs keep 16-bit copies of weights, which changes no result: each start chooses by what is free."""

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint and the run's arguments hold of it."""
        return {**asdict(self.limits), "checkpointing": self.checkpointing}

    def largest(self, train: Train, world: int, longest: int) -> int:
        """Tokens of the largest pass that there may be, padding included, of rows of up to `longest` tokens."""
        tokens = longest * (self.limits.rows or rows_per_process(train, world))
        return max(longest, min(tokens, self.limits.tokens or tokens))

    def rows_to_validate(self, train: Train, world: int, examples: Sequence[Example]) -> int | None:
        """Rows of a batch of validation, which keeps no activations; None where there is nothing to validate."""
        if not examples:
            return None
        rows = rows_per_pass(rows_per_process(train, world), train.micro_batch_size, on_cpu=True) or 1
        longest = max(lengths_of(examples))
        return max(1, min(rows, (self.limits.tokens or rows * longest) // longest))


def choose_passes(recipe: Recipe, layout: Layout, state: PartialState, longest: int, newest: Path | None) -> RunPasses:
    """The passes of a run whose longest row has `longest` tokens, and whose newest checkpoint is given.

    Every process must ask, before it loads the base: the one with the least free memory decides for all.
    """
    recorded = read_json(newest / OBJECTIVE).get("passes") if newest else None
    free = min(processes.gather(free_bytes(state.device)))
    if recorded:
        passes = RunPasses(PassLimits(recorded["rows"], recorded["tokens"]), recorded["checkpointing"])
        return replace(passes, copies=_copies_fit(recipe, layout, state, longest, passes, free))
    train, able = recipe.train, layout.skeleton.supports_gradient_checkpointing
    if train.activation_checkpointing is True and not able:
        raise FieldError("train.activation_checkpointing", "this model's code does not support it; try auto")
    share = rows_per_process(train, state.num_processes)
    rows = rows_per_pass(share, train.micro_batch_size, state.device.type == "cpu")
    size = choose_pass_size(recipe, layout, state.num_processes, longest, state.device, free)
    # Settings of the recipe stand, whatever is free.
    tokens = train.micro_batch_tokens or (None if train.micro_batch_size else size.tokens)
    return RunPasses(PassLimits(rows, tokens), size.checkpointing and able, size.reason, size.copies)


def _copies_fit(
    recipe: Recipe, layout: Layout, state: PartialState, longest: int, passes: RunPasses, free: int
) -> bool:
    """Whether CPUs have room for copies of weights beside the passes that a run began with."""
    if state.device.type != "cpu":
        return False
    world = state.num_processes
    memory = forecast(layout, setting_of(recipe, world, "cpu"), longest)
    return copies_fit(memory, passes.largest(recipe.train, world, longest), passes.checkpointing, free // world)


def record_start(
    record: Callable[[Record], None], step: int, card_lines: list[str], sources: list[Findings], passes: RunPasses
) -> None:
    """Record what is to be said of a mixture, the GPUs and the size of passes before the first step."""
    for line in source_notes(sources, 0):
        record({"step": step, "sources": line})
    for line in card_lines:
        record({"step": step, "warning": line})
    if passes.line:
        record({"step": step, "passes": passes.line})
