"""What is checked around a merge: base, disk and memory before it, files and a 4-bit run's gaps after it."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from llmtune.adapters.delta import BASE, load_delta
from llmtune.errors import FullMemoryError, MachineError, ProofError
from llmtune.estimate.memory import merge_bytes
from llmtune.files import read_json
from llmtune.inference.placement import linear_layers
from llmtune.machine.device import free_bytes
from llmtune.merging.proof import logits, probes
from llmtune.model.base import Base, build_skeleton, load_model
from llmtune.model.files.fingerprints import fingerprint_base, refuse_other_base
from llmtune.model.files.quantization import dequantized_format
from llmtune.model.files.stored import stored_tensors
from llmtune.model.parts import converted_keys
from llmtune.model.tokens import load_tokenizer
from llmtune.numbers import size
from llmtune.recipe.sections import Recipe
from llmtune.run import Run

CPU = torch.device("cpu")
LESS_MEMORY = "free some memory, merge on a larger machine, or go without with merge.enabled: false"


def count_weights(base: Base) -> int:
    """Return how many numbers the base's weights are, each counted once where matrices are tied."""
    return sum(tensor.numel() for tensor in build_skeleton(base).parameters())


def disk_bytes(base: Base, dtype: str) -> int:
    """Return the bytes of disk that merging into a base takes: the weights, and what the proof puts beside them.

    Stock transformers writes experts that it joins as it loads them to disk in fp32, and removes them.
    """
    skeleton, stored = build_skeleton(base), stored_tensors(base.folder, base.name)
    joined = sum(math.prod(stored[key].shape) for key in converted_keys(skeleton, list(stored)))
    return count_weights(base) * getattr(torch, dtype).itemsize + torch.float32.itemsize * joined


def check_base(run: Run, base: Base) -> None:
    """Raise ProofError if a base is not the one that a run's delta was trained on, by its name and its files."""
    refuse_other_base(run.manifest().get("base"), base, run.path, ProofError)
    stored, files = read_json(run.delta / BASE), fingerprint_base(base)
    if (stored["base"], stored["revision"]) != (base.name, base.revision):
        trained_on, named = _named(stored["base"], stored["revision"]), _named(base.name, base.revision)
        raise ProofError(f"{run.delta}: was trained on {trained_on}, but the recipe names {named}")
    before = stored.get("files", files)
    if others := [name for name in sorted({*before, *files}) if before.get(name) != files.get(name)]:
        raise ProofError(f"{run.delta}: was trained on another {base.name}, whose {others[0]} differs")


def _named(base: str, revision: str | None) -> str:
    return f"{base} at revision {revision}" if revision else base


def check_disk(run: Run, needed: int) -> None:
    """Raise MachineError if the disk of merged/ has less room than `needed` bytes once the old folder is gone.

    What is behind a link goes only when the new weights are complete.
    """
    goes = run.merged.rglob("*") if not run.merged.is_symlink() else ()
    old = sum(file.stat().st_size for file in goes if file.is_file())
    free = shutil.disk_usage(run.merged if run.merged.is_dir() else run.path).free + old
    if free < needed:
        raise MachineError(f"{run.path}: merging needs {size(needed)} of disk, but only {size(free)} is free")


def headers(folder: Path, dtype: str) -> dict[str, Any]:
    """Return tensors, bytes and dtype by the safetensors headers; raises ProofError for another dtype or no values."""
    short = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    files, count = sorted(folder.glob("*.safetensors")), 0
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                part = stored.get_slice(name)
                kind, shape = part.get_dtype(), part.get_shape()
                if 0 in shape or (kind != short and kind.startswith(("F", "BF"))):
                    raise ProofError(f"{file.name}: {name} is {kind} of shape {shape}, but should be {short}")
                count += 1
    return {"dtype": dtype, "tensors": count, "bytes": sum(file.stat().st_size for file in files)}


def memory_words(base: Base, dtype: str, bits: int | None = None, whole: bool = False) -> tuple[int, str]:
    """Return the bytes of memory that merging into a base takes, and what for.

    A quantized run is compared with its base dequantized to float32; `whole` is for a merge in memory.
    """
    skeleton = build_skeleton(base)
    whole = whole or dequantized_format(skeleton.config) is not None
    needed = merge_bytes(skeleton, getattr(torch, dtype), whole)
    compared = merge_bytes(skeleton, getattr(torch, dtype), whole, quantized=bits is not None)
    if compared > needed:
        return compared, f"comparing with the trained {bits}-bit model holds the weights in float32, {size(compared)}"
    held = "the weights" if whole else "a file of weights"
    return needed, f"merging holds {held} in {dtype} and a block of them in float32, {size(needed)}"


def check_memory(needed: int, words: str) -> None:
    """Raise FullMemoryError if this machine has less memory free than merging takes."""
    free = free_bytes(CPU)
    if free < needed:
        raise FullMemoryError(f"{words}, and {size(free)} of memory is free; {LESS_MEMORY}")


def compare_with_quantized(run: Run, settings: Recipe, base: Base, bits: int, original: torch.Tensor) -> dict[str, Any]:
    """Return logit gaps between the trained quantized model and the delta on the original and a dequantized base.

    `original` are the logits of the delta on the original base. All is computed on the CPU, one model at a time.
    """
    tokenizer = load_tokenizer(base)
    ids = [tokenizer(text).input_ids for text in probes(settings)]
    options: dict[str, Any] = {"device": CPU}
    if settings.model.quantize != "none":
        options |= {"keep": linear_layers(settings, build_skeleton(base))[1], "bits": bits}
    trained = logits(load_delta(load_model(base, **options), run.delta), ids)
    back: Any = load_model(base, **options).dequantize()
    dequantized = logits(load_delta(back.float(), run.delta), ids)
    gaps = {"original": (original - trained).abs(), "dequantized": (dequantized - trained).abs()}
    return {
        f"gap_to_{bits}bit": {name: {"max": float(gap.max()), "mean": float(gap.mean())} for name, gap in gaps.items()},
        "merged_into": "original",
    }
