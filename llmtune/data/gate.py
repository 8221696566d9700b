"""Checks a user's data before anything trains, and writes down what it found."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from llmtune.data.encoding.rules import Rules
from llmtune.data.example import Example
from llmtune.data.findings import PRINTED_IDS, Findings, Parts, describe, format_ids, summarize_rows, write_notes
from llmtune.data.mixture import count_shared, count_tokens, describe_sources, draw_places
from llmtune.data.near.notes import find_near
from llmtune.data.near.texts import Documents
from llmtune.data.overlap import find_overlap, hold_out, share_of
from llmtune.data.row import Row
from llmtune.data.rows import SPLITS
from llmtune.data.sources import problem
from llmtune.data.store.batches import Job
from llmtune.data.store.build import EncodedPart, encode_rows
from llmtune.data.store.encoded import EncodedRows, supervised_of
from llmtune.data.store.read import read_part
from llmtune.data.store.rows import StoredRows
from llmtune.errors import FieldError
from llmtune.model.tokens import Limits
from llmtune.recipe.sections import Data, Recipe
from llmtune.run import locates_mistakes

FEW_SHOT_SEED = 1234


@dataclass(frozen=True)
class Gate:
    """The data that passed the checks: encoded train and eval examples, test rows, and the findings for data.json.

    Many rows stay on disk, where they are mapped into memory.
    """

    train: Sequence[Example]
    eval: Sequence[Example]
    test: Sequence[Row]
    shots: list[Row]
    """Worked examples for the few-shot base: rows that are trained on, always the same ones."""
    findings: Findings
    rows: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    """The rows of the train and eval examples, by part."""


@locates_mistakes
def gate(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    stop: set[int],
    limits: Limits | None = None,
    documents: Documents | None = None,
) -> Gate:
    """Read, compare, split and encode the recipe's data; raises RecipeError where training on it would be wrong.

    `limits` are the model's: rows over its positions count as longer than max_length. `documents` are the suite's:
    with them, near duplicates are looked for.
    """
    check_sources(recipe)
    return check_data(recipe.data, tokenizer, stop, limits, recipe.eval.shots, recipe.train.seed, documents)


def check_sources(recipe: Recipe) -> None:
    """Raise FieldError for a source of the recipe's data that does not exist; names every place it was looked for."""
    for part in SPLITS:
        for key, source in recipe.data.source_keys(part).items():
            reason = problem(source, recipe.folders(key), SPLITS[part])
            if reason:
                raise FieldError(key, reason)


def check_data(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    stop: set[int],
    limits: Limits | None = None,
    shots: int = 0,
    seed: int = 0,
    documents: Documents | None = None,
) -> Gate:
    """Do what `gate` does for a recipe's data section, with `seed` for a mixture; raises FieldError at its key."""
    wanted = data.max_length
    if limits and limits.positions and limits.positions < wanted:
        data = data.model_copy(update={"max_length": limits.positions})
    sources, used, rows, overlap = _parted(data, seed)
    job = Job(tokenizer, frozenset(stop), Rules.of(data), limits.vocabulary if limits else None)
    encoded = {part: encode_rows(rows[part], job) for part in ("train", "eval")}
    for part, result in encoded.items():
        check_length(part, result, data.max_length)
        check_supervised(data, part, result.examples)
    findings = describe(data, sources, rows, encoded, tokenizer) | {"overlap": overlap}
    examples = encoded["train"].examples
    tokens = count_tokens(rows["train"].labels("source"), examples.rows, examples.lengths)
    findings["sources"] = describe_sources(data, sources["train"].counts("source"), used.counts("source"), tokens)
    if documents is not None:
        findings["near_duplicates"] = find_near(rows, documents)
    findings["shared_rows"] = count_shared(used.labels("source"), used.exacts) if findings["sources"] else 0
    findings["notes"] = write_notes(findings)
    if data.max_length < wanted:
        message = f"the model learned {data.max_length} positions, so max_length is {data.max_length}, not {wanted}"
        findings["notes"].insert(0, message)
    drawn = draw_shots(rows["train"], examples, shots) if tokenizer.chat_template else []
    return Gate(examples, encoded["eval"].examples, rows["test"], drawn, findings, rows)


def split_rows(data: Data, seed: int) -> tuple[StoredRows, StoredRows]:
    """The rows that are trained on, and those that base and tuned model are compared on, as `check_data` has them."""
    rows = _parted(data, seed).rows
    return rows["train"], rows["test"]


class _Parted(NamedTuple):
    """The rows of a data section."""

    sources: Parts
    """All that were read, by part."""
    used: StoredRows
    """Those of train without overlap, drawn where it is a mixture, before any is held out."""
    rows: Parts
    """Those to train on, to validate on and to compare on: train, eval and test."""
    overlap: Findings


def _parted(data: Data, seed: int) -> _Parted:
    sources = {part: read_part(data, part) for part in SPLITS}
    kept, overlap = remove_overlap(sources, data.overlap)
    used = kept.take(draw_places(data, kept.labels("source"), seed))
    train, held_out = (used, sources["eval"]) if data.eval else _split(used, data.eval_fraction)
    train = train.take(share_of(train.contents, data.share))
    rows = {"train": train, "eval": held_out, "test": sources["test"] if data.test else held_out}
    return _Parted(sources, used, rows, overlap)


def _split(rows: StoredRows, fraction: float) -> tuple[StoredRows, StoredRows]:
    held_out = hold_out(rows.contents, fraction, rows.labels("source"))
    return rows.take(np.flatnonzero(~held_out)), rows.take(np.flatnonzero(held_out))


def draw_shots(rows: StoredRows, examples: EncodedRows, count: int) -> list[Row]:
    """Draw `count` of the conversations that are trained on, always the same ones."""
    trained = np.unique(examples.rows[~examples.is_text]).tolist()
    return [rows[place] for place in random.Random(FEW_SHOT_SEED).sample(trained, min(count, len(trained)))]


def remove_overlap(sources: Parts, policy: str) -> tuple[StoredRows, Findings]:
    """Apply `data.overlap` to train rows that eval or test contains; returns the rows that stay, and the findings."""
    train = sources["train"]
    overlaps = {part: find_overlap(train, sources[part]) for part in ("eval", "test")}
    same_content = np.unique(np.concatenate([places for places, _ in overlaps.values()]))
    same_prompt = np.setdiff1d(np.concatenate([places for _, places in overlaps.values()]), same_content)
    if len(same_content) and policy == "error":
        count, first = len(same_content), train[int(same_content[0])].where
        raise FieldError("data.overlap", f"{count} train rows are also in eval or test; the first is {first}")
    if len(same_content) == len(train) and policy == "drop":
        raise FieldError("data.train", "every train row is also in eval or test; no row is left to train on")
    findings = {
        "policy": policy,
        **summarize_rows(train, same_content),
        **{f"in_{part}": len(places) for part, (places, _) in overlaps.items()},
        "same_prompt": summarize_rows(train, same_prompt),
        "eval_in_test": len(find_overlap(sources["eval"], sources["test"])[0]),
    }
    kept = np.setdiff1d(np.arange(len(train)), same_content) if policy == "drop" else np.arange(len(train))
    return train.take(kept), findings


def check_length(part: str, encoded: EncodedPart, max_length: int) -> None:
    """Raise FieldError where every row of a part is too long."""
    dropped = encoded.notes.dropped_lengths
    if dropped and not encoded.examples:
        least = "at least " if len(encoded.notes.bounded) == len(dropped) else ""
        raise FieldError(
            "data.max_length",
            f"all {len(dropped)} {part} rows are longer than max_length {max_length} "
            f"(the shortest has {least}{min(dropped)} tokens); try {min(dropped)} or more",
        )


def check_supervised(data: Data, part: str, examples: Sequence[Example]) -> None:
    """Raise FieldError at the key of the part's rows, `data.train` if they were held out, for nothing to learn."""
    masked = [place for place, supervised in enumerate(supervised_of(examples)) if not supervised]
    if masked:
        share = "no row has" if len(masked) == len(examples) else f"{len(masked)} of {len(examples)} rows do not have"
        ids = format_ids([examples[place].id for place in masked[: PRINTED_IDS + 1]])
        raise FieldError(
            f"data.{part if getattr(data, part) else 'train'}",
            f"{share} a token to learn from ({ids}): chat template or max_length leaves no answer",
        )
