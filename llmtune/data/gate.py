"""The gate: the one place where a user's data is checked before anything trains; what it finds is written down."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmtune.data import overlap
from llmtune.data.encode import Encoded, Example, encode
from llmtune.data.findings import Finding, describe, listed, notes, shown
from llmtune.data.rows import Row, read
from llmtune.data.sources import problem
from llmtune.errors import FieldError, RecipeError
from llmtune.recipe.sections import Recipe
from llmtune.run import locates_mistakes

_SPLITS = {"train": "train", "eval": "validation", "test": "test"}


@dataclass(frozen=True)
class Gate:
    """What passed: encoded train and eval examples, test rows, and the findings that go to data.json."""

    train: list[Example]
    eval: list[Example]
    test: list[Row]
    findings: Finding


@locates_mistakes
def gate(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, stop: set[int]) -> Gate:
    """Read, compare, split and encode the recipe's data; raises RecipeError where training on it would be wrong."""
    data = recipe.data
    given = {part: _read(recipe, part) for part in _SPLITS}
    kept, shared = without_overlap(recipe, given)
    train, held = (kept, given["eval"]) if data.eval else overlap.set_aside(kept, data.eval_fraction)
    test = given["test"] if data.test else held
    encoded = {
        part: encode(rows, tokenizer, stop, data.max_length, data.overlength)
        for part, rows in (("train", train), ("eval", held))
    }
    for part, found in encoded.items():
        check_length(recipe, part, found)
        check_supervised(recipe, part, found.examples)
        check_stop(found.examples, stop)
        check_bos(found.examples, tokenizer)
    rows = {"train": train, "eval": held, "test": test}
    findings = describe(recipe, given, rows, encoded, tokenizer) | {"overlap": shared}
    return Gate(encoded["train"].examples, encoded["eval"].examples, test, findings | {"notes": notes(findings)})


def without_overlap(recipe: Recipe, given: dict[str, list[Row]]) -> tuple[list[Row], Finding]:
    """The train rows that stay by the recipe's rule for rows that also stand in eval or test, and what was found."""
    train, policy = given["train"], recipe.data.overlap
    keys = {part: overlap.keys(rows) for part, rows in given.items()}
    found = {part: overlap.shared(keys["train"], keys[part]) for part in ("eval", "test")}
    whole = sorted({place for places, _ in found.values() for place in places})
    asked = sorted({place for _, places in found.values() for place in places} - set(whole))
    if whole and policy == "error":
        first = train[whole[0]].where
        raise FieldError("data.overlap", f"{len(whole)} train rows also stand in eval or test; the first is {first}")
    if len(whole) == len(train) and policy == "drop":
        raise FieldError("data.train", "every train row also stands in eval or test; nothing is left to train on")
    out = set(whole) if policy == "drop" else set()
    finding = {
        "policy": policy,
        **listed([train[place].id for place in whole]),
        **{f"in_{part}": len(places) for part, (places, _) in found.items()},
        "same_prompt": listed([train[place].id for place in asked]),
        "eval_in_test": len(overlap.shared(keys["eval"], keys["test"])[0]),
    }
    return [row for place, row in enumerate(train) if place not in out], finding


def check_length(recipe: Recipe, part: str, found: Encoded) -> None:
    """Raise RecipeError where every row of a part is too long."""
    if found.dropped and not found.examples:
        limit, shortest = recipe.data.max_length, min(found.dropped_lengths)
        raise FieldError(
            "data.max_length",
            f"all {len(found.dropped)} {part} rows are longer than max_length {limit} "
            f"(shortest has {shortest} tokens); nearest valid: {shortest}",
        )


def check_supervised(recipe: Recipe, part: str, examples: list[Example]) -> None:
    """Raise RecipeError where an example has nothing to learn."""
    masked = [example.id for example in examples if example.supervised == 0]
    if masked:
        share = "no row has" if len(masked) == len(examples) else f"{len(masked)} of {len(examples)} rows do not have"
        raise FieldError(
            f"data.{part if getattr(recipe.data, part) else 'train'}",
            f"{share} a token to learn from ({shown(masked)}): chat template or max_length leaves none of the answer",
        )


def check_stop(examples: list[Example], stop: set[int]) -> None:
    """Raise RecipeError where an example does not end in a learned stop token."""
    for example in examples:
        if example.labels[-1] not in stop:
            raise RecipeError(f"{example.where}: does not end in a learned stop token; generation would not end either")


def check_bos(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise RecipeError where an example starts with two BOS tokens."""
    bos = tokenizer.bos_token_id
    for example in examples:
        if bos is not None and example.input_ids[:2] == [bos, bos]:
            raise RecipeError(
                f"{example.where}: starts with {tokenizer.bos_token!r} twice; take it out of row or template"
            )


def _read(recipe: Recipe, part: str) -> list[Row]:
    """The rows of a part, none where the recipe does not name it."""
    source = getattr(recipe.data, part)
    if source is None:
        return []
    reason = problem(source)
    if reason:
        raise FieldError(f"data.{part}", reason)
    return read(source, _SPLITS[part])
