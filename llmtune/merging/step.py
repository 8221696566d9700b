"""merge(run): base + delta -> full weights that stock transformers loads, proved against the live tuned model."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.adapters.delta import BASE, load_delta
from llmtune.errors import MachineError, ProofError
from llmtune.evaluation.boundary import lacks_named
from llmtune.files import read_json, remove_leftovers, write_folder, write_json
from llmtune.machine.memory import trim_heap
from llmtune.merging.adding import add_delta, fp32_logits, load_compact, round_buffers
from llmtune.merging.checks import (
    LESS_MEMORY,
    check_disk,
    check_memory,
    compare_with_quantized,
    count_weights,
    headers,
    memory_words,
)
from llmtune.merging.digests import digests
from llmtune.merging.proof import Reloaded, load_with_stock_transformers, probes, within
from llmtune.merging.untouched import beyond_text, count_kept, left_out
from llmtune.model.base import Base, build_skeleton, load_config
from llmtune.model.blocks import distances
from llmtune.model.check import check_same_shapes
from llmtune.model.files.fingerprints import COPIED, leads_outside, refuse_other_base
from llmtune.model.files.locate import locate_base, locate_original
from llmtune.model.files.quantization import HOW_QUANTIZED, dequantized_format, kept_bits, stored_quantization
from llmtune.model.kinds import auto_class
from llmtune.model.mlp import with_widths
from llmtune.model.quantize import bits_of
from llmtune.model.tokens import load_tokenizer
from llmtune.numbers import size
from llmtune.recipe.sections import Recipe
from llmtune.run import Run, locates_mistakes
from llmtune.working import working

# Measured on SmolLM2-135M, whose logits reach 40: merging LoRA in fp32 moves them by 1.1e-4, rounding the merged
# weights to bfloat16 by 0.18, random changes of every weight by no more than rounding by 0.50. On tiny models of
# eight architectures rounding moved them by 0.4 to 2 times what the random changes did.
_FP32_BOUND = (1e-4, 1e-5)
"""Absolute, and as a share of the largest logit; the larger one counts."""
_ROUNDING_BOUND = (4, 0.05)
"""Times the effect of random changes, and as a share of the largest logit, as a router may choose another expert."""


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
        _check_base(run.delta, base)
        refuse_other_base(run.manifest().get("base"), base, run.path, ProofError)
        if into is not base:
            check_same_shapes(base, build_skeleton(base), into)
        weights = count_weights(into)
        remove_leftovers(run.merged)  # a killed merge leaves gigabytes
        check_disk(run, weights * getattr(torch, settings.merge.dtype).itemsize)
        needed, words = memory_words(into, weights, settings.merge.dtype, _trained_bits(settings, base))
        check_memory(needed, words)
    with lacks_named("merge", f"{words}; {LESS_MEMORY}"), working("merging"):
        facts = _replace_merged(run, settings, base, into)
    print(
        f"merged, {facts['dtype']}: on {facts['texts']} texts, largest logit gap to the live tuned model "
        f"{facts['gap']:.2g} (bound {facts['bound']:.2g}; {max(facts['gap_in_memory'], facts['gap_on_disk']):.2g} "
        f"without rounding; training moved logits by {facts['shift']:.2g}); "
        f"{facts['changed']} of {facts['tensors']} tensors differ from the base"
    )
    if bits := _trained_bits(settings, base):
        gap = facts[f"gap_to_{bits}bit"]["original"]["max"]
        print(f"the largest logit gap to the model with the {bits}-bit base that was trained is {gap:.2g}")
    if facts["gap"] > facts["shift"] / 2:
        print("rounding undid much of what training changed; try merge.dtype: float32")
    return facts


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
    dtype = getattr(torch, name)
    tokenizer = load_tokenizer(base)
    texts = probes(settings)
    ids = [tokenizer(text).input_ids for text in texts]
    with working("loading the base model"):
        _refuse_quantized(into)
        weights, untuned = load_compact(into, ids)
    before = digests(weights, dtype, "the base")
    with working("loading the delta"):
        tuned = load_delta(weights, run.delta, as_stored=True)
        live = fp32_logits(tuned, ids)
    if not torch.isfinite(live).all():
        raise ProofError(f"{run.delta}: the tuned model's logits are not finite; train again at a lower rate")
    scale = float(live.abs().max())
    fp32_bound = max(_FP32_BOUND[0], _FP32_BOUND[1] * scale)
    with working("adding the delta to the weights"):
        merged, exact = add_delta(tuned, dtype, ids)
        in_memory = within("adding the delta to the weights", exact, live, fp32_bound)
        rounded = fp32_logits(merged, ids)
    changed = sum(before[name] != digest for name, digest in digests(merged, dtype, "the merged model").items())
    if not changed:
        raise ProofError(f"{run.delta}: merged in {name}, every tensor equals the base's; try merge.dtype: float32")
    with working(f"writing the merged weights in {name}"):
        round_buffers(merged, dtype)
        unloaded = left_out(merged, into, dtype)
        save_folder(merged, base.folder, folder, name, unloaded, into.folder)
    loaded_by = auto_class(merged.config).__name__, type(merged).__name__
    rest = [*beyond_text(merged, distances(build_skeleton(into))), *unloaded]
    del weights, tuned, merged
    trim_heap()
    reloaded = _reload(folder, texts, dtype, tokenizer, loaded_by)
    rounding_bound = max(_ROUNDING_BOUND[0] * reloaded.rounding, _ROUNDING_BOUND[1] * scale)
    bound = fp32_bound if dtype == torch.float32 else rounding_bound
    on_disk = within("writing and reading the weights", reloaded.logits, rounded, fp32_bound)
    facts = {
        "gap": within(f"rounding the weights to {name}", reloaded.logits, live, bound),
        "bound": bound,
        "mean_gap": float((reloaded.logits - live).abs().mean()),
        "gap_in_memory": in_memory,
        "gap_on_disk": on_disk,
        "rounding": reloaded.rounding,
        "shift": float((live - untuned).abs().max()),
        "largest_logit": scale,
        "changed": changed,
        "kept": count_kept(rest, into, folder, dtype),
        "texts": len(texts),
        "base": {"name": into.name, "revision": into.revision, "hub_id": into.hub_id},
        **headers(folder, name),
    }
    return facts, live


def _reload(
    folder: Path, texts: list[str], dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, loaded_by: tuple[str, str]
) -> Reloaded:
    """Read the merged folder with stock transformers; raises ProofError if class, tensors, tokens or template differ.

    `loaded_by` names the class that people load it with, and the class that they get.
    """
    auto, kind = loaded_by
    reloaded = load_with_stock_transformers(folder, texts, dtype, auto)
    if reloaded.name != kind:
        raise ProofError(f"the merged folder is read as a {reloaded.name} by {auto}, and what was trained is a {kind}")
    ids = [tokenizer(text).input_ids for text in texts]
    if reloaded.mismatched or reloaded.ids != ids or reloaded.template != tokenizer.chat_template:
        difference = (reloaded.mismatched or ["tokens or chat template"])[0]
        raise ProofError(f"the merged folder, read by stock transformers, differs from the base: {difference}")
    return reloaded


def _check_base(delta: Path, base: Base) -> None:
    stored = read_json(delta / BASE)
    if (stored["base"], stored["revision"]) != (base.name, base.revision):
        raise ProofError(
            f"{delta}: was trained on {stored['base']} at revision {stored['revision']}, "
            f"but the recipe names {base.name} at revision {base.revision}"
        )


def _refuse_quantized(base: Base) -> None:
    """Raise ProofError for a base that is stored quantized."""
    config = load_config(base)
    if stored_quantization(config) is not None and not dequantized_format(config):
        raise ProofError(f"{base.name} is stored quantized; a delta is merged into a 16- or 32-bit base only")


def _trained_bits(settings: Recipe, base: Base) -> int | None:
    """The bits that the linear layers had in training; None where they had 16 or 32."""
    return bits_of(settings.model.quantize) or kept_bits(load_config(base))


def save_folder(
    weights: PreTrainedModel,
    base: Path,
    folder: Path,
    dtype: str,
    unloaded: dict[str, torch.Tensor] | None = None,
    original: Path | None = None,
) -> None:
    """Write weights in shards of 5 GB, config with its new dtype, and tokenizer and template from the base.

    `unloaded` are tensors of the base's files that the model does not have. The config is that of the `original`, where
    the weights are not the base's.
    """
    needed = sum(tensor.numel() * tensor.element_size() for tensor in weights.parameters())
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise MachineError(f"{folder.parent}: merging needs {size(needed)} of disk, but only {size(free)} is free")
    tensors = {**weights.state_dict(), **unloaded} if unloaded else None
    weights.save_pretrained(folder, state_dict=tensors, max_shard_size="5GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = with_widths(_with_dtype(read_json((original or base) / "config.json"), dtype), weights)
    config = {key: value for key, value in config.items() if key not in HOW_QUANTIZED}
    write_json(folder / "config.json", config if "torch_dtype" in config else {**config, "dtype": dtype})
    for file in {file for pattern in COPIED for file in base.glob(pattern) if file.is_file()}:
        if leads_outside(file, base):
            raise ProofError(f"{file}: is a link to a file outside the base's folder; replace it by the file itself")
        target = folder / file.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {
        key: dtype
        if key in ("dtype", "torch_dtype")
        else _with_dtype(value, dtype)
        if isinstance(value, dict)
        else value
        for key, value in config.items()
    }
