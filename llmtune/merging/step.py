"""merge(run): base + delta -> full weights that stock transformers loads, proved against the live tuned model."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llmtune.errors import ProofError
from llmtune.evaluation.boundary import lacks_named
from llmtune.files import remove_leftovers, write_folder
from llmtune.merging.checks import (
    LESS_MEMORY,
    check_base,
    check_disk,
    check_memory,
    compare_with_quantized,
    disk_bytes,
    headers,
    memory_words,
)
from llmtune.merging.outcome import Outcome
from llmtune.merging.proof import Reloaded, load_with_stock_transformers, probes, within
from llmtune.merging.shards.merge import ShardMerge, merge_by_shards
from llmtune.merging.shards.stored import UnsupportedError
from llmtune.merging.untouched import count_kept
from llmtune.merging.whole import WholeMerge, merge_in_memory
from llmtune.model.base import Base, build_skeleton, load_config
from llmtune.model.check import check_same_shapes
from llmtune.model.files.locate import locate_base, locate_original
from llmtune.model.files.quantization import dequantized_format, kept_bits, stored_quantization
from llmtune.model.quantize import bits_of
from llmtune.model.tokens import load_tokenizer
from llmtune.recipe.sections import Recipe
from llmtune.run import Run, locates_mistakes
from llmtune.working import working


@locates_mistakes
def merge(run: Run) -> dict[str, Any]:
    """Write full weights to merged/ and return the facts of the proof.

    Raises ProofError, and leaves no folder, if they are not the tuned model; MachineError for too little disk.
    """
    settings = run.recipe()
    if settings.method.adapter.unmergeable:
        raise ProofError(settings.method.adapter.unmergeable.message)
    with lacks_named("merge"), working("checking what is merged"):
        base = locate_base(settings.model)
        into = (
            locate_original(settings.model.merge_into, settings.model.add_tokens) if settings.model.merge_into else base
        )
        run.verify("train")
        check_base(run, base)
        if into is not base:
            check_same_shapes(base, build_skeleton(base), into)
        remove_leftovers(run.merged)  # a killed merge leaves gigabytes
        check_disk(run, disk_bytes(into, settings.merge.dtype))
        needed, words = memory_words(into, settings.merge.dtype, _trained_bits(settings, base))
        check_memory(needed, words)
    with lacks_named("merge", f"{words}; {LESS_MEMORY}"), working("merging"):
        facts = _replace_merged(run, settings, base, into)
    _tell(run, facts, _trained_bits(settings, base))
    return facts


def _tell(run: Run, facts: dict[str, Any], bits: int | None) -> None:
    """Print what was proved of a merge; `bits` are those of the linear layers in training, if they were few."""
    cause = "combining" if run.combined else "training"
    print(
        f"merged, {facts['dtype']}: on {facts['texts']} texts, largest logit gap to the live tuned model "
        f"{facts['gap']:.2g} (bound {facts['bound']:.2g}; {max(facts['gap_in_memory'], facts['gap_on_disk']):.2g} "
        f"without rounding; {cause} moved logits by {facts['shift']:.2g}); "
        f"{facts['changed']} of {facts['tensors']} tensors differ from the base"
    )
    if bits:
        gap = facts[f"gap_to_{bits}bit"]["original"]["max"]
        print(f"the largest logit gap to the model with the {bits}-bit base that was trained is {gap:.2g}")
    if facts["gap"] > facts["shift"] / 2:
        print(f"rounding undid much of what {cause} changed; try merge.dtype: float32")


def _replace_merged(run: Run, settings: Recipe, base: Base, into: Base) -> dict[str, Any]:
    """Remove what an earlier merge wrote, merge, and record the step; returns its facts."""
    run.forget("merge")
    shutil.rmtree(run.merged, ignore_errors=True)
    with write_folder(run.merged) as folder:
        facts, live = _write(run, settings, base, into, folder)
        bits = _trained_bits(settings, base)
        if bits:
            with working(f"comparing with the trained {bits}-bit model"):
                facts |= compare_with_quantized(run, settings, base, bits, live)
        if into is not base:
            facts["merged_into"] = into.hub_id or Path(into.name).name  # its folder may be a copy with new tokens
    with working("hashing the merged folder"):
        run.mark("merge", [run.merged], **facts)
    return facts


def _write(run: Run, settings: Recipe, base: Base, into: Base, folder: Path) -> tuple[dict[str, Any], torch.Tensor]:
    """Merge in fp32, round, write, read again in a fresh process; compare each step's logits with the live model's.

    The delta goes `into` the base, or the 16-bit model that it was made from. Returns the facts of the proof, and the
    live model's logits.
    """
    name = settings.merge.dtype
    tokenizer = load_tokenizer(base)
    texts = probes(settings)
    merging = _compute(run, into, [tokenizer(text).input_ids for text in texts], getattr(torch, name))
    outcome = merging.outcome
    live, bound = outcome.tuned, outcome.bound
    within(f"rounding the weights to {name}", outcome.rounded, live, bound)
    changed = merging.write(folder, base)
    if not changed:
        raise ProofError(f"{run.delta}: merged in {name}, every tensor equals the base's; try merge.dtype: float32")
    reloaded = _reload(folder, texts, tokenizer, outcome)
    on_disk = within("writing and reading the weights", reloaded.logits, outcome.rounded, outcome.fp32_bound)
    facts = {
        "gap": within(f"rounding the weights to {name}", reloaded.logits, live, bound),
        "bound": bound,
        "mean_gap": float((reloaded.logits - live).abs().mean()),
        "gap_in_memory": outcome.in_memory,
        "gap_on_disk": on_disk,
        "rounding": outcome.rounding or 0.0,
        "shift": outcome.shift,
        "largest_logit": outcome.scale,
        "changed": changed,
        "kept": count_kept(merging.beyond_text(), into, folder, getattr(torch, name)),
        "by": outcome.by,
        "texts": len(texts),
        "base": {"name": into.name, "revision": into.revision, "hub_id": into.hub_id},
        **headers(folder, name),
    }
    return facts, live


def _compute(run: Run, into: Base, ids: list[list[int]], dtype: torch.dtype) -> ShardMerge | WholeMerge:
    """Merge part by part or, where the model does not allow it, in memory; raises FullMemoryError for too little."""
    _refuse_quantized(into)
    try:
        return merge_by_shards(into, run.delta, ids, dtype)
    except UnsupportedError as reason:
        print(f"this architecture is merged in memory: {reason}")
        check_memory(*memory_words(into, str(dtype).removeprefix("torch."), whole=True))
        return merge_in_memory(into, run.delta, ids, dtype)


def _reload(folder: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase, outcome: Outcome) -> Reloaded:
    """Read the merged folder with stock transformers; raises ProofError where it is not the model that was trained."""
    auto, kind = outcome.loaded_by, outcome.kind
    reloaded = load_with_stock_transformers(folder, texts, auto)
    if reloaded.name != kind:
        raise ProofError(f"the merged folder is read as a {reloaded.name} by {auto}, and what was trained is a {kind}")
    ids = [tokenizer(text).input_ids for text in texts]
    if reloaded.mismatched or reloaded.ids != ids or reloaded.template != tokenizer.chat_template:
        difference = (reloaded.mismatched or ["tokens or chat template"])[0]
        raise ProofError(f"the merged folder, read by stock transformers, differs from the base: {difference}")
    return reloaded


def _refuse_quantized(base: Base) -> None:
    """Raise ProofError for a base that is stored quantized."""
    config = load_config(base)
    if stored_quantization(config) is not None and not dequantized_format(config):
        raise ProofError(f"{base.name} is stored quantized; a delta is merged into a 16- or 32-bit base only")


def _trained_bits(settings: Recipe, base: Base) -> int | None:
    """The bits that the linear layers had in training; None where they had 16 or 32."""
    return bits_of(settings.model.quantize) or kept_bits(load_config(base))
