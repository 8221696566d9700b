"""Merges in memory, for models whose parts cannot be read, changed and compared one by one."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from llmtune.adapters.delta import load_delta
from llmtune.errors import ProofError
from llmtune.kernels.finite import is_finite
from llmtune.machine.memory import trim_heap
from llmtune.merging.adding import add_delta, fp32_logits, load_compact, round_buffers
from llmtune.merging.compact import in_fp32
from llmtune.merging.digests import digests
from llmtune.merging.folder import save_small_files
from llmtune.merging.outcome import Outcome, fp32_bound, largest_gap
from llmtune.merging.proof import jitter, logits, within
from llmtune.merging.untouched import beyond_text, left_out
from llmtune.model.base import Base, build_skeleton
from llmtune.model.blocks import distances
from llmtune.model.kinds import auto_class
from llmtune.working import working


@dataclass
class WholeMerge:
    """A merge that is computed and proved in memory, and not written yet."""

    outcome: Outcome
    into: Base
    dtype: torch.dtype
    changed: int
    _merged: PreTrainedModel | None
    _unloaded: dict[str, torch.Tensor]
    _rest: list[str]

    def write(self, folder: Path, base: Base) -> int:
        """Write a merged folder with the tokenizer of the `base`, and free the model; returns changed parameters."""
        merged, self._merged = self._merged, None
        if merged is None:
            raise RuntimeError("it is written already")
        name = str(self.dtype).removeprefix("torch.")
        with working(f"writing the merged weights in {name}"):
            round_buffers(merged, self.dtype)
            tensors = {**merged.state_dict(), **self._unloaded} if self._unloaded else None
            merged.save_pretrained(folder, state_dict=tensors, max_shard_size="5GB")
            (folder / "generation_config.json").unlink(missing_ok=True)
            save_small_files(folder, base.folder, name, self.into.folder, merged)
        del merged, tensors
        self._unloaded = {}
        trim_heap()
        return self.changed

    def beyond_text(self) -> list[str]:
        """The stored tensors that text does not pass, and that no delta changes."""
        return self._rest


def merge_in_memory(into: Base, delta: Path, ids: list[list[int]], dtype: torch.dtype) -> WholeMerge:
    """Compute what merging a delta gives, with the whole model in memory in `dtype`.

    Raises ProofError where the delta is not one of this base.
    """
    with working("loading the base model"):
        weights, untuned = load_compact(into, ids)
    before = digests(weights, dtype, "the base")
    with working("loading the delta"):
        tuned = load_delta(weights, delta, as_stored=True)
        live = fp32_logits(tuned, ids)
    if not torch.isfinite(live).all():
        raise ProofError(f"{delta}: the tuned model's logits are not finite; train again at a lower rate")
    with working("adding the delta to the weights"):
        merged, exact = add_delta(tuned, dtype, ids)
        in_memory = within("adding the delta to the weights", exact, live, fp32_bound(live))
        _refuse_infinite(merged, dtype)
        narrow = fp32_logits(merged, ids)
        rounding = None
        if dtype != torch.float32:
            rounding = largest_gap(_jittered_logits(merged, ids, torch.finfo(dtype).eps), narrow)
    changed = sum(before[name] != digest for name, digest in digests(merged, dtype, "the merged model").items())
    kinds = type(merged).__name__, auto_class(merged.config).__name__
    outcome = Outcome(live, narrow, largest_gap(live, untuned), in_memory, rounding, *kinds, by="memory")
    unloaded = left_out(merged, into, dtype)
    rest = [*beyond_text(merged, distances(build_skeleton(into))), *unloaded]
    return WholeMerge(outcome, into, dtype, changed, merged, unloaded, rest)


def _jittered_logits(model: PreTrainedModel, ids: list[list[int]], epsilon: float) -> torch.Tensor:
    with in_fp32(model, lambda number, weight: jitter(number, weight, epsilon)):
        return logits(model, ids)


def _refuse_infinite(model: PreTrainedModel, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            kind = str(dtype).removeprefix("torch.")
            raise ProofError(
                f"{name}: has a weight that {kind} lacks, which ends at {torch.finfo(dtype).max:.6g}; "
                "nothing was merged; try merge.dtype: bfloat16"
            )
