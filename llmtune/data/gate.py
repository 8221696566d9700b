"""Checks a user's data before anything trains, and writes down what it found."""

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmtune.data.encoding.encode import Encoded, Example, encode
from llmtune.data.encoding.rules import Rules
from llmtune.data.findings import Findings, Parts, describe, format_ids, summarize_ids, write_notes
from llmtune.data.mixture import count_shared, count_tokens, describe_sources, draw_rows, read_training
from llmtune.data.near.notes import find_near
from llmtune.data.near.texts import Documents
from llmtune.data.overlap import dedup_keys, find_overlap, hold_out
from llmtune.data.row import Row
from llmtune.data.rows import Form, read
from llmtune.data.sources import problem
from llmtune.errors import FieldError, RecipeError
from llmtune.model.tokens import Limits
from llmtune.recipe.sections import Data, Recipe
from llmtune.run import locates_mistakes

FEW_SHOT_SEED = 1234
_SPLITS = {"train": "train", "eval": "validation", "test": "test"}


@dataclass(frozen=True)
class Gate:
    """The data that passed the checks: encoded train and eval examples, test rows, and the findings for data.json."""

    train: list[Example]
    eval: list[Example]
    test: list[Row]
    shots: list[Row]
    """Worked examples for the few-shot base: rows that are trained on, always the same ones."""
    findings: Findings


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
    for part in _SPLITS:
        for key, source in recipe.data.source_keys(part).items():
            reason = problem(source, recipe.folders(key), _SPLITS[part])
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
    form, named = Form.of(data), {part: getattr(data, part) for part in ("eval", "test")}
    held = {part: read(source, _SPLITS[part], form) if source else [] for part, source in named.items()}
    sources = {"train": read_training(data), **held}
    kept, overlap = remove_overlap(sources, data.overlap)
    used = draw_rows(data, kept, seed)
    train, held_out = (used, sources["eval"]) if data.eval else hold_out(used, data.eval_fraction)
    rows = {"train": train, "eval": held_out, "test": sources["test"] if data.test else held_out}
    encoded = {part: encode(rows[part], tokenizer, stop, Rules.of(data)) for part in ("train", "eval")}
    for part, result in encoded.items():
        check_length(part, result, data.max_length)
        check_supervised(data, part, result.examples)
        check_stop(result.examples, stop)
        check_bos(result.examples, tokenizer)
        check_ids(result.examples, tokenizer, limits)
    findings = describe(data, sources, rows, encoded, tokenizer) | {"overlap": overlap}
    tokens = count_tokens(train, encoded["train"].examples)
    findings["sources"] = describe_sources(data, sources["train"], used, tokens)
    if documents is not None:
        findings["near_duplicates"] = find_near(rows, documents)
    findings["shared_rows"] = count_shared(used) if findings["sources"] else 0
    findings["notes"] = write_notes(findings)
    if data.max_length < wanted:
        message = f"the model learned {data.max_length} positions, so max_length is {data.max_length}, not {wanted}"
        findings["notes"].insert(0, message)
    examples = encoded["train"].examples
    drawn = draw_shots(train, examples, shots) if tokenizer.chat_template else []
    return Gate(examples, encoded["eval"].examples, rows["test"], drawn, findings)


def draw_shots(rows: list[Row], examples: list[Example], count: int) -> list[Row]:
    """Draw `count` of the rows that are trained on, always the same ones."""
    trained = {example.where for example in examples}
    among = [row for row in rows if row.where in trained]
    return random.Random(FEW_SHOT_SEED).sample(among, min(count, len(among)))


def remove_overlap(sources: Parts, policy: str) -> tuple[list[Row], Findings]:
    """Apply `data.overlap` to train rows that eval or test contains; returns the rows that stay, and the findings."""
    train = sources["train"]
    keys = {part: dedup_keys(rows) for part, rows in sources.items()}
    overlaps = {part: find_overlap(keys["train"], keys[part]) for part in ("eval", "test")}
    same_content = sorted({index for indices, _ in overlaps.values() for index in indices})
    same_prompt = sorted({index for _, indices in overlaps.values() for index in indices} - set(same_content))
    if same_content and policy == "error":
        count, first = len(same_content), train[same_content[0]].where
        raise FieldError("data.overlap", f"{count} train rows are also in eval or test; the first is {first}")
    if len(same_content) == len(train) and policy == "drop":
        raise FieldError("data.train", "every train row is also in eval or test; no row is left to train on")
    dropped = set(same_content) if policy == "drop" else set()
    findings = {
        "policy": policy,
        **summarize_ids([train[index].id for index in same_content]),
        **{f"in_{part}": len(indices) for part, (indices, _) in overlaps.items()},
        "same_prompt": summarize_ids([train[index].id for index in same_prompt]),
        "eval_in_test": len(find_overlap(keys["eval"], keys["test"])[0]),
    }
    return [row for index, row in enumerate(train) if index not in dropped], findings


def check_length(part: str, encoded: Encoded, max_length: int) -> None:
    """Raise FieldError where every row of a part is too long."""
    if encoded.dropped and not encoded.examples:
        shortest = min(encoded.dropped_lengths)
        least = "at least " if len(encoded.bounded) == len(encoded.dropped) else ""
        raise FieldError(
            "data.max_length",
            f"all {len(encoded.dropped)} {part} rows are longer than max_length {max_length} "
            f"(the shortest has {least}{shortest} tokens); try {shortest} or more",
        )


def check_supervised(data: Data, part: str, examples: list[Example]) -> None:
    """Raise FieldError at the key of the part's rows, `data.train` if they were held out, for nothing to learn."""
    masked = [example.id for example in examples if example.supervised == 0]
    if masked:
        share = "no row has" if len(masked) == len(examples) else f"{len(masked)} of {len(examples)} rows do not have"
        raise FieldError(
            f"data.{part if getattr(data, part) else 'train'}",
            f"{share} a token to learn from ({format_ids(masked)}): chat template or max_length leaves no answer",
        )


def check_stop(examples: list[Example], stop: set[int]) -> None:
    """Raise RecipeError where an example does not end in a learned stop token."""
    for example in examples:
        if example.labels[-1] not in stop:
            raise RecipeError(
                f"{example.where}: does not end in a learned stop token; the tuned model would not stop either"
            )


def check_ids(examples: list[Example], tokenizer: PreTrainedTokenizerBase, limits: Limits | None) -> None:
    """Raise RecipeError where a row has a token that the model has no embedding of."""
    if limits is None:
        return
    for example in examples:
        highest = max(example.input_ids)
        if highest >= limits.vocabulary:
            raise RecipeError(
                f"{example.where}: has the token {tokenizer.convert_ids_to_tokens(highest)!r} with the id {highest}, "
                f"but the model has {limits.vocabulary} tokens: its tokenizer is another model's, or was added to"
            )


def check_bos(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise RecipeError where an example starts with two BOS tokens."""
    bos = tokenizer.bos_token_id
    for example in examples:
        if bos is not None and example.input_ids[:2] == [bos, bos]:
            raise RecipeError(
                f"{example.where}: starts with {tokenizer.bos_token!r} twice; remove it from the row or the template"
            )
