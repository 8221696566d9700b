"""combine(runs): several trained runs of one base become a new run, whose delta is proved against the live ones."""

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llmtune import __version__
from llmtune.combining.adapters import join_adapters
from llmtune.combining.held_out import count_trained
from llmtune.combining.parts import Part, read_parts
from llmtune.combining.request import Request
from llmtune.combining.tensors import join_tensors
from llmtune.combining.words import combined_words, overlap_words
from llmtune.errors import FullMemoryError, RecipeError
from llmtune.files import read_json, write_folder, write_json
from llmtune.machine.device import free_bytes
from llmtune.merging.checks import check_base
from llmtune.merging.proof import probes
from llmtune.model.base import Base, load_config
from llmtune.model.files.fingerprints import describe_base
from llmtune.model.files.locate import ADAPTER as ADAPTER_CONFIG
from llmtune.model.files.locate import locate_base
from llmtune.model.files.quantization import dequantized_format, stored_quantization
from llmtune.model.files.stored import weight_files
from llmtune.model.tokens import load_tokenizer
from llmtune.numbers import size
from llmtune.recipe.sections import Recipe
from llmtune.run import Run
from llmtune.working import working


def combine(runs: Sequence[Run], request: Request, out: Path) -> Run:
    """Write the combination of trained runs to the folder of a new one, and return that.

    Raises RecipeError for runs that cannot be joined, and ProofError where the written delta is not their combination;
    then nothing is written.
    """
    with contextlib.ExitStack() as stack:
        for run in {run.path.resolve(): run for run in runs}.values():
            stack.enter_context(run.locked())
        with working("checking the runs"):
            parts = read_parts(runs, request)
            base = _located(parts[0])
            _check_memory(base, parts)
        with write_folder(out) as folder:
            combined = _write(Run(folder), parts, request, base)
    for line in (*_result(combined), *overlap_words(combined)):
        print(line)
    return Run(out)


def _located(first: Part) -> Base:
    """The base of the runs; raises ProofError where its files have changed, RecipeError where they are quantized."""
    base = locate_base(first.settings.model)
    check_base(first.run, base)
    config = load_config(base)
    if stored_quantization(config) is not None and not dequantized_format(config):
        message = f"was trained on {base.name}, which is stored quantized"
        raise RecipeError(f"{first.run.path}: {message}; deltas are combined over a 16- or 32-bit base")
    return base


def _check_memory(base: Base, parts: Sequence[Part]) -> None:
    """Raise FullMemoryError where the base and the deltas, joined in fp32, need more than is free."""
    weights = sum(file.stat().st_size for file in weight_files(base.folder, base.name))
    deltas = sum(facts["bytes"] for part in parts for facts in part.files.values())
    free = free_bytes(torch.device("cpu"))
    if weights + deltas > free:
        message = f"combining holds the base, {size(weights)}, and the deltas, {size(deltas)}"
        raise FullMemoryError(
            f"{message}, and {size(free)} of memory is free; free some, or combine on a larger machine"
        )


def _write(run: Run, parts: list[Part], request: Request, base: Base) -> dict[str, Any]:
    """Write everything of the new run, and return the facts of the combination."""
    first = parts[0]
    combined = _describe(parts, request)
    with working("comparing held-out and training rows"):
        combined["held_out"] = count_trained(parts)
    tokenizer = load_tokenizer(base)
    ids = [tokenizer(text).input_ids for text in probes(first.settings)]
    join = join_tensors if first.adapter.trains_base else join_adapters
    proof = join(base, parts, request, run.delta, ids, combined).facts() | {"texts": len(ids)}
    write_json(run.manifest_file, {"llmtune": __version__, "steps": {}, "base": describe_base(base)})
    if first.run.data_file.is_file():
        shutil.copyfile(first.run.data_file, run.data_file)
    facts = combined | proof | _rank(run)
    run.mark("train", [run.delta], combined=facts)
    Run(run.path, _settings(first, run)).keep_settings()
    return facts


def _describe(parts: Sequence[Part], request: Request) -> dict[str, Any]:
    """What is recorded of a combination: the runs by name, with weight, method and the SHA-256 of what they trained."""
    runs = [
        {
            "name": part.name,
            "weight": part.weight,
            "method": part.settings.method_words,
            "sha256": part.sha256,
            **({"start": part.base["start"]} if part.base.get("start") else {}),
        }
        for part in parts
    ]
    return {"how": request.how, "density": request.density, "seed": request.seed, "runs": runs}


def _rank(run: Run) -> dict[str, int]:
    """The rank of a combined LoRA; nothing for others."""
    file = run.delta / ADAPTER_CONFIG
    rank = read_json(file).get("r") if file.is_file() else None
    return {"rank": rank} if rank else {}


def _settings(first: Part, run: Run) -> Recipe:
    """The recipe of the first run with the adapter that the combination has, and without what is that run's alone."""
    settings = first.settings
    adapter = settings.method.adapter.joined(_rank(run).get("rank"))
    model: dict[str, Any] = {"start": None}
    if first.adapter.trains_base:
        model["quantize"] = "none"  # another run may have trained what this one quantized
    changed = {
        "model": settings.model.model_copy(update=model),
        "method": settings.method.model_copy(update={"adapter": adapter}),
        "publish": None,
        "track": (),
    }
    return settings.model_copy(update=changed)


def _result(combined: dict[str, Any]) -> list[str]:
    rank = f"; LoRA of rank {combined['rank']}" if "rank" in combined else ""
    gap = f"on {combined['texts']} texts, largest logit gap to the live combination {combined['gap']:.2g}"
    return [
        f"{combined_words(combined)}{rank}",
        f"{gap} (bound {combined['bound']:.2g}; it moves logits by {combined['shift']:.2g})",
    ]
