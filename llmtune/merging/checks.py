"""What is checked around a merge: disk and memory before it, the written files and a 4-bit run's gaps after it."""

import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

from llmtune.adapters.delta import load_delta
from llmtune.errors import MachineError, ProofError
from llmtune.merging.proof import logits, probes
from llmtune.model.base import Base, build_skeleton, load_model, model_facts
from llmtune.model.quantize import split_linear_layers
from llmtune.model.tokens import load_tokenizer
from llmtune.numbers import size
from llmtune.recipe.sections import Recipe
from llmtune.run import Run


def count_weights(base: Base) -> int:
    """Return how many numbers the base's weights are, each counted once where matrices are tied."""
    return sum(tensor.numel() for tensor in build_skeleton(base).parameters())


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
    short = {"float32": "F32", "bfloat16": "BF16"}[dtype]
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


def compare_with_4bit(run: Run, settings: Recipe, base: Base) -> dict[str, Any]:
    """Return logit gaps between the trained 4-bit model and the delta on the original and on a dequantized base."""
    tokenizer = load_tokenizer(base)
    ids = [tokenizer(text).input_ids for text in probes(settings)]
    skeleton = build_skeleton(base)
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
