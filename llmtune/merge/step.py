"""merge(run): base + delta -> full weights that stock transformers loads, proved against the live tuned model."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from transformers import PreTrainedModel

from llmtune.adapters.delta import BASE, load_delta
from llmtune.errors import MachineError, ProofError
from llmtune.files import fingerprint, read_json, write_json
from llmtune.merge.proof import load_with_stock_transformers, logits, probes, within
from llmtune.model.base import Base, build_skeleton, load_model, load_tokenizer, locate_base, model_facts
from llmtune.model.mlp import with_widths
from llmtune.model.quantize import split_linear_layers
from llmtune.recipe.sections import Recipe
from llmtune.run import Run, locates_mistakes

COPIED = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""What a merged folder takes over from its base, byte by byte."""

# Measured on SmolLM2-135M, logits up to 40: merging LoRA in fp32 moves them by 1.1e-4, rounding the merged weights
# to bfloat16 by 0.18, moving every weight at random by no more than rounding does by 0.50. On tiny models of eight
# architectures rounding moved them by 0.4 to 2 times what the random moves did.
_CLOSE = (1e-4, 1e-5)
_ROUNDED = (4, 0.05)
"""Times the random moves, and least part of the largest logit: a router may choose another expert in one of the two."""


@locates_mistakes
def merge(run: Run) -> dict[str, Any]:
    """Write run.merged and give what was proved of it; raises ProofError, and leaves no folder, for another model."""
    settings = run.recipe()
    if settings.method.adapter.unmergeable:
        raise ProofError(settings.method.adapter.unmergeable.message)
    base = locate_base(settings.model)
    _same_delta(run)
    _same_base(run.delta, base)
    run.forget("merge")
    partial = run.path / ".merged.partial"
    for folder in (run.merged, partial):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        facts = _write(run, settings, base, partial)
        if settings.model.quantize == "4bit":
            facts |= _against_4bit(run, base, probes(settings))
        partial.rename(run.merged)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    run.mark("merge", [run.merged], **facts)
    print(
        f"merged, {facts['dtype']}: largest logit gap to the live tuned model {facts['gap']:.2g} "
        f"(bound {facts['bound']:.2g}; training moved logits by {facts['shift']:.2g}); "
        f"{facts['changed']} of {facts['tensors']} tensors differ from the base"
    )
    if facts["gap"] > facts["shift"] / 2:
        print("rounding took much of what training changed; merge.dtype: float32 keeps it")
    return facts


def _write(run: Run, settings: Recipe, base: Base, folder: Path) -> dict[str, Any]:
    """Merge in fp32, round, write, read in a fresh process; each step's logits are compared with the live model's."""
    name = settings.merge.dtype
    dtype = getattr(torch, name)
    tokenizer = load_tokenizer(base)
    texts = probes(settings)
    ids = [tokenizer(text).input_ids for text in texts]
    weights = _plain_base(base)
    untuned, before = logits(weights, ids), _digests(weights, dtype)
    tuned = load_delta(weights, run.delta)
    live = logits(tuned, ids)
    if not torch.isfinite(live).all():
        raise ProofError(f"{run.delta}: the tuned model's logits are not finite; train again at a lower rate")
    scale = float(live.abs().max())
    close = max(_CLOSE[0], _CLOSE[1] * scale)
    merged = _unload(tuned)
    in_memory = within("adding the delta to the weights", logits(merged, ids), live, close)
    _round(merged, dtype)
    rounded = logits(merged, ids)
    changed = sum(before[name] != digest for name, digest in _digests(merged, dtype).items())
    if not changed:
        raise ProofError(
            f"{run.delta}: merged in {name}, every tensor equals the base's; merge.dtype: float32 keeps more"
        )
    _save(merged.to(dtype), base.folder, folder, name)
    del weights, tuned, merged
    again = load_with_stock_transformers(folder, texts, dtype)
    bound = close if dtype == torch.float32 else max(_ROUNDED[0] * again.rounding, _ROUNDED[1] * scale)
    if again.odd or again.ids != ids or again.template != tokenizer.chat_template:
        raise ProofError(f"the merged folder reads unlike the base: {(again.odd or ['tokens or chat template'])[0]}")
    on_disk = within("writing and reading the weights", again.logits, rounded, close)
    return {
        "gap": within(f"rounding the weights to {name}", again.logits, live, bound),
        "bound": bound,
        "mean_gap": float((again.logits - live).abs().mean()),
        "gap_in_memory": in_memory,
        "gap_on_disk": on_disk,
        "rounding": again.rounding,
        "shift": float((live - untuned).abs().max()),
        "largest_logit": scale,
        "changed": changed,
        "base": {"name": base.name, "revision": base.revision, "hub_id": base.hub_id},
        **_headers(folder, name),
    }


def _same_delta(run: Run) -> None:
    for name, facts in run.manifest()["steps"].get("train", {}).get("files", {}).items():
        if not (run.path / name).is_file() or fingerprint(run.path / name) != facts:
            raise ProofError(f"{run.path / name}: is not what training left; train again: llmtune train {run.path}")


def _same_base(delta: Path, base: Base) -> None:
    stored = read_json(delta / BASE)
    if (stored["base"], stored["revision"]) != (base.name, base.revision):
        raise ProofError(
            f"{delta}: was trained on {stored['base']} at revision {stored['revision']}, "
            f"but the recipe gives {base.name} at revision {base.revision}"
        )


def _plain_base(base: Base) -> PreTrainedModel:
    """The base in fp32; raises ProofError for one that is stored quantized."""
    if "quantization_config" in read_json(base.folder / "config.json"):
        raise ProofError(f"{base.name} is stored quantized; a delta is merged into a 16- or 32-bit base only")
    return load_model(base)


def _unload(tuned: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model with the adapter added to its weights; raises ProofError where one of two tied matrices is adapted."""
    if not isinstance(tuned, PeftModel):
        return tuned
    plain = tuned.get_base_model()
    if plain.config.get_text_config().tie_word_embeddings:
        ends = [plain.get_input_embeddings(), plain.get_output_embeddings()]
        adapted = [
            name for name, module in plain.named_modules() if isinstance(module, BaseTunerLayer) and module in ends
        ]
        if adapted:
            raise ProofError(f"{adapted[0]} is adapted, but embedding and head are one matrix here; adapt other layers")
    merged: PreTrainedModel = tuned.merge_and_unload(safe_merge=True)
    return merged.eval()


def _round(weights: PreTrainedModel, dtype: torch.dtype) -> None:
    with torch.no_grad():
        for tensor in weights.parameters():
            tensor.copy_(tensor.to(dtype))


def _digests(weights: PreTrainedModel, dtype: torch.dtype) -> dict[str, str]:
    """SHA-256 of every parameter as it is stored in `dtype`."""
    return {
        name: hashlib.sha256(tensor.detach().to(dtype).flatten().view(torch.uint8).numpy()).hexdigest()
        for name, tensor in weights.named_parameters()
    }


def _save(weights: PreTrainedModel, base: Path, folder: Path, dtype: str) -> None:
    """Write the weights in shards of 5 GB, and config (with its new dtype), tokenizer and template from the base."""
    needed = sum(tensor.numel() * tensor.element_size() for tensor in weights.parameters())
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise MachineError(
            f"{folder.parent}: merging needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free"
        )
    weights.save_pretrained(folder, max_shard_size="5GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = with_widths(_with_dtype(read_json(base / "config.json"), dtype), weights)
    write_json(folder / "config.json", config if "torch_dtype" in config else {**config, "dtype": dtype})
    for file in {file for pattern in COPIED for file in base.glob(pattern) if file.is_file()}:
        # A file of the Hub's cache is a link to the blobs beside it; any other link could carry a private file along.
        if not any(file.resolve().is_relative_to(root.resolve()) for root in (base, base.parent.parent / "blobs")):
            raise ProofError(f"{file}: is a link that leads out of the base's folder; put the file itself there")
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


def _headers(folder: Path, dtype: str) -> dict[str, Any]:
    """Tensors, bytes and dtype by the safetensors headers; raises ProofError for another dtype or an empty tensor."""
    short = {"float32": "F32", "bfloat16": "BF16"}[dtype]
    files, count = sorted(folder.glob("*.safetensors")), 0
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                part = stored.get_slice(name)
                kind, shape = part.get_dtype(), part.get_shape()
                if 0 in shape or (kind != short and kind.startswith(("F", "BF"))):
                    raise ProofError(f"{file.name}: {name} is {kind} of shape {shape}, but {short} was asked for")
                count += 1
    return {"dtype": dtype, "tensors": count, "bytes": sum(file.stat().st_size for file in files)}


def _against_4bit(run: Run, base: Base, texts: list[str]) -> dict[str, Any]:
    """Logit gaps from the trained 4-bit model to the delta on the original base, and on the base 4-bit and back."""
    tokenizer = load_tokenizer(base)
    ids = [tokenizer(text).input_ids for text in texts]
    settings, skeleton = run.recipe(), build_skeleton(base)
    plan, adapted = settings.plan(model_facts(skeleton)), not settings.method.adapter.trains_base
    _, keep = split_linear_layers(skeleton, plan, adapted)
    trained = logits(load_delta(load_model(base, keep=keep), run.delta), ids)
    back: Any = load_model(base, keep=keep).dequantize()
    candidates = {"original": load_model(base), "dequantized": back.float()}
    gaps = {name: (logits(load_delta(one, run.delta), ids) - trained).abs() for name, one in candidates.items()}
    return {
        "gap_to_4bit": {name: {"max": float(gap.max()), "mean": float(gap.mean())} for name, gap in gaps.items()},
        "merged_into": "original",
    }
