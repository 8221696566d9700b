"""Proves that a GGUF file is the merged model: logits within a bound, tokens the same, and the same greedy answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmtune.errors import ProofError
from llmtune.exporting.gguf.reading import read_model
from llmtune.exporting.gguf.types import rounded
from llmtune.exporting.rows import Prompts, answers
from llmtune.machine.memory import trim_heap
from llmtune.merging.compact import in_fp32
from llmtune.merging.outcome import fp32_bound, largest_gap
from llmtune.merging.proof import logits
from llmtune.model.base import Base, load_model
from llmtune.working import working

TIMES = 4
"""How often the effect of random errors, each as large as the type's own, a file may have."""
LEAST_EQUAL = {"q8_0": 0.5}
"""Share of answers that must be the same; of smaller types, a different answer needs a near tie alone."""
_SHOWN = 80


@dataclass(frozen=True)
class Difference:
    """A row that two models answer differently: which, both answers, and how near the merged model's choice was."""

    row: int
    merged: str
    other: str
    margin: float
    """Between the merged model's best logit and that of the other answer's token, at the first that differs."""


def prove_equal(
    file: Path,
    kind: str,
    base: Base,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    prompts: Prompts,
    own: bool,
) -> tuple[dict[str, Any], list[list[int]]]:
    """The facts of the proof that a file of `kind` is the merged model `base`, and the merged model's answers.

    `ids` are the texts whose logits are compared. Both models compute in fp32 on the CPU, one after the other. Raises
    ProofError with both answers where the file's differ. `own` tells that llmtune wrote the file.
    """
    config, merged, expected, as_stored, effect = _computed_merged(base, kind, ids, prompts)
    read = read_model(file, config)
    with working(f"comparing {file.name} with the merged weights"):
        actual = logits(read, ids)
    gap, reading_gap = (largest_gap(actual, other) for other in (expected, as_stored))
    others = answers(read, prompts, file.name)
    del read
    trim_heap()
    bound = max(fp32_bound(expected), TIMES * effect)
    # llmtune's own file holds these very values; a converter may choose other types for some tensors.
    reading_bound = fp32_bound(expected) if own else bound
    differences = _differences(base, tokenizer, prompts, merged, others)
    gaps = [(gap, bound, "the merged model's"), (reading_gap, reading_bound, f"those of its weights in {kind}")]
    _judge(file.name, kind, gaps, differences, len(merged))
    facts = {
        "gap": gap,
        "bound": bound,
        "gap_read": reading_gap,
        "rounding": effect,
        "largest_logit": float(expected.abs().max()),
        "texts": len(ids),
    }
    return facts | {"rows": len(merged), "equal": len(merged) - len(differences)}, merged


def _computed_merged(
    base: Base, kind: str, ids: list[list[int]], prompts: Prompts
) -> tuple[PreTrainedConfig, list[list[int]], torch.Tensor, torch.Tensor, float]:
    """What the merged model has and computes: configuration, answers, logits, those of its weights in `kind`.

    Last is how far random errors, each as large as the type's own, move its logits.
    """
    with working("loading the merged weights"):
        model = load_model(base)
        expected = logits(model, ids)
    with working(f"measuring what rounding to {kind} does"):
        effect = largest_gap(_with_errors(model, kind, ids, at_random=True), expected)
        as_stored = _with_errors(model, kind, ids, at_random=False)
    merged = answers(model, prompts, "the merged model")
    config: PreTrainedConfig = model.config
    del model
    trim_heap()
    return config, merged, expected, as_stored, effect


def _judge(
    name: str, kind: str, gaps: list[tuple[float, float, str]], differences: list[Difference], rows: int
) -> None:
    """Raise ProofError where logits are over a bound, or answers differ without a near tie.

    `gaps` are the largest gaps, to what, with their bounds; the first is to the merged model's logits.
    """
    over = [one for one in gaps if not one[0] <= one[1]]
    far = [one for one in differences if not one.margin <= gaps[0][1]]
    share = LEAST_EQUAL.get(kind, 0.0)
    if not over and not far and rows - len(differences) >= share * rows:
        return
    gap, bound, other = (over or gaps)[0]
    reason = (
        f"{name} is not the merged model: the largest gap of its logits to {other} is {gap:.3g} (bound {bound:.3g})"
    )
    if not differences:
        raise ProofError(f"{reason}; nothing was exported")
    worst = max(differences, key=lambda one: one.margin)
    raise ProofError(
        f"{reason}, and its answers differ on {len(differences)} of {rows} rows: row {worst.row} has "
        f"{worst.other[:_SHOWN]!r}, and the merged model answers {worst.merged[:_SHOWN]!r}; nothing was exported"
    )


def _with_errors(model: PreTrainedModel, kind: str, ids: list[list[int]], at_random: bool) -> torch.Tensor:
    """Logits with each weight as the type rounds it, or `at_random` moved as far, up or down."""

    def change(number: int, weight: torch.Tensor) -> None:
        values = weight.numpy()
        stored = torch.from_numpy(rounded(values, kind).reshape(values.shape))
        if at_random:
            signs = torch.randint(0, 2, weight.shape, generator=torch.Generator().manual_seed(number))
            weight += (stored - weight) * (2 * signs - 1)
        else:
            weight.copy_(stored)

    with in_fp32(model, change):
        return logits(model, ids)


def _differences(
    base: Base, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, merged: list[list[int]], others: list[list[int]]
) -> list[Difference]:
    """The rows whose answers differ, with the merged model's margins."""
    rows = [row for row, (one, other) in enumerate(zip(merged, others, strict=True)) if one != other]
    if not rows:
        return []
    model = load_model(base)
    differences = []
    for row in rows:
        pairs = zip(merged[row], others[row], strict=False)
        place = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
        margin = float("inf")  # one answer is the other's start, which equal models never give
        if place is not None:
            context = torch.tensor([[*prompts.ids[row], *merged[row][:place]]])
            with torch.inference_mode():
                last = model(input_ids=context).logits[0, -1].float()
            margin = float(last[merged[row][place]] - last[others[row][place]])
        ours, other = (str(tokenizer.decode(answer)) for answer in (merged[row], others[row]))
        differences.append(Difference(row + 1, ours, other, margin))
    return differences
