"""Merges part by part: base, tuned, merged and rounded model run block by block, then the files are written."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llmtune.errors import ProofError
from llmtune.merging.adding import refuse_tied
from llmtune.merging.folder import save_small_files
from llmtune.merging.outcome import STATE_BOUND, Outcome, fp32_bound, largest_gap
from llmtune.merging.proof import jitter, within
from llmtune.merging.shards.change import Change, Tuned
from llmtune.merging.shards.hollow import Weights, build_hollow
from llmtune.merging.shards.passes import Finish, Pass, run_pass, same_states
from llmtune.merging.shards.stored import StoredWeights, UnsupportedError
from llmtune.merging.shards.write import Merger, Part, find_parts, rounded, write_weights
from llmtune.model.base import Base, build_skeleton, load_config
from llmtune.model.blocks import distances
from llmtune.model.files.quantization import dequantized_format
from llmtune.model.kinds import auto_class
from llmtune.working import working


@dataclass
class ShardMerge:
    """A merge that is computed and proved in memory, and not written yet."""

    outcome: Outcome
    merger: Merger
    parts: list[Part]
    into: Base

    def write(self, folder: Path, base: Base) -> int:
        """Write a merged folder with the tokenizer of the `base`; returns how many of its tensors changed."""
        changed = write_weights(self.merger, self.parts, folder)
        wider = self.merger.stock if self.merger.change.wide else None
        dtype = str(self.merger.dtype).removeprefix("torch.")
        save_small_files(folder, base.folder, dtype, self.into.folder, wider)
        return changed

    def beyond_text(self) -> list[str]:
        """The stored tensors that text does not pass, and that no delta changes."""
        reached = distances(build_skeleton(self.into))
        stored: StoredWeights = self.merger.weights.stored
        kept = (key for key in stored.tensors if not stored.dropped(key))
        parameters = set(self.merger.weights.names.values())
        return [key for key in kept if (name := stored.owner.get(key)) is None or name in parameters - {*reached}]


def merge_by_shards(into: Base, delta: Path, ids: list[list[int]], dtype: torch.dtype) -> ShardMerge:
    """Compute what merging a delta gives, a block at a time; raises UnsupportedError for models that need it whole.

    Raises ProofError where the delta is not one of this base, or adding it does not give the tuned model.
    """
    if dequantized_format(load_config(into)):
        raise UnsupportedError("its weights are dequantized as they are loaded")
    model, stored = build_hollow(into)
    weights = Weights(model, stored)
    with working("running the base model, a block at a time"):
        base = run_pass(model, weights, ids).logits
    if not torch.isfinite(base).all():
        raise UnsupportedError("its blocks read weights of other blocks")
    with working("loading the delta"):
        tuned = weights.tune(model, delta)
        refuse_tied(tuned)
        change = Change(tuned)
        stock = change.stock(tuned)
        parts = find_parts(tuned, weights, change, stock)
    with working("running the tuned model, a block at a time"):
        live = run_pass(tuned, weights, ids)
    if not torch.isfinite(live.logits).all():
        raise ProofError(f"{delta}: the tuned model's logits are not finite; train again at a lower rate")
    shift = largest_gap(live.logits, base)
    del base
    exact, in_memory = _compare_added(tuned, weights, ids, change, live)
    live.states.clear()
    narrow, rounding = exact, None
    if dtype != torch.float32:
        with working("rounding the merged weights, a block at a time"):
            narrow = run_pass(tuned, weights, ids, change, _rounding(dtype)).logits
            finish = _rounding(dtype, [*weights.names.values()])
            rounding = largest_gap(run_pass(tuned, weights, ids, change, finish).logits, narrow)
    kinds = type(model).__name__, auto_class(model.config).__name__
    outcome = Outcome(live.logits, narrow, shift, in_memory, rounding, *kinds)
    return ShardMerge(outcome, Merger(weights, change, stock, dtype), parts, into)


def _compare_added(
    tuned: Tuned, weights: Weights, ids: list[list[int]], change: Change, live: Pass
) -> tuple[torch.Tensor, float]:
    """The logits of the model whose adapters are added in fp32, and their largest gap to the live model's."""
    what = "adding the delta to the weights"
    with working(f"{what}, a block at a time"):
        exact = run_pass(tuned, weights, ids, change)
    same_states(what, exact, live, STATE_BOUND)
    if exact.idle:
        raise ProofError(f"{exact.idle[0]} is adapted, but the model does not run it; adapt other layers")
    return exact.logits, within(what, exact.logits, live.logits, fp32_bound(live.logits))


def _rounding(dtype: torch.dtype, names: list[str] | None = None) -> Finish:
    """What rounds; with the `names` of all parameters it also changes each at random by less than its rounding."""
    number = {name: index for index, name in enumerate(names or [])}

    def finish(own: dict[str, nn.Parameter]) -> None:
        for name, parameter in own.items():
            parameter.data.copy_(rounded(name, parameter.data, dtype))
            if names:
                jitter(number[name], parameter.data, torch.finfo(dtype).eps)

    return finish
