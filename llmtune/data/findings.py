"""What the gate found, as plain values for data.json, and as lines for people."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmtune.data import overlap
from llmtune.data.encode import IGNORED, Encoded, Example
from llmtune.data.rows import Row
from llmtune.data.sources import is_file
from llmtune.data.template import template_sha256
from llmtune.files import fingerprint
from llmtune.recipe.sections import Recipe

Finding = dict[str, Any]
Parts = dict[str, list[Row]]

_SHOWN = 20


def describe(
    recipe: Recipe, given: Parts, rows: Parts, encoded: dict[str, Encoded], tokenizer: PreTrainedTokenizerBase
) -> Finding:
    """Counts, lengths, hashes and one marked example; `given` is what was read, `rows` what the parts became."""
    train = encoded["train"]
    return {
        "rows": {part: len(found) for part, found in rows.items()},
        "files": {part: _file(getattr(recipe.data, part), found) for part, found in given.items() if found},
        "max_length": recipe.data.max_length,
        "tokenizer_limit": tokenizer.model_max_length if tokenizer.model_max_length < 1 << 40 else None,
        **_tokens(train.examples),
        "over_length": {part: _over_length(found) for part, found in encoded.items()},
        "partly_learned": listed(train.partly_learned),
        "duplicates": overlap.duplicates(rows["train"]),
        "ignored_columns": sorted({column for found in given.values() for row in found for column in row.ignored}),
        "special_tokens_in_text": listed(_with_special_tokens(rows["train"], tokenizer)),
        "template_adds": train.template_adds,
        "template_sha256": template_sha256(tokenizer),
        "example": marked(train.examples[0], tokenizer),
    }


def notes(found: Finding) -> list[str]:
    """What a user should know of the findings, one line each."""
    shared, tokens = found["overlap"], found["supervised_tokens"]
    same, special, partly = shared["same_prompt"], found["special_tokens_in_text"], found["partly_learned"]
    limit = found["tokenizer_limit"]
    lines = [
        f"{tokens['total']} tokens to learn in {found['examples']} rows (mean {tokens['mean']}, max {tokens['max']})",
        f"max_length {found['max_length']}; the longest row has {found['longest']} tokens",
    ]
    lines += [_over_length_note(part, over) for part, over in found["over_length"].items() if over["rows"]]
    told = [
        (limit and found["longest"] > limit, f"warning: the tokenizer says that the model takes {limit} tokens"),
        (found["rows"]["eval"] == 0, "no validation rows: eval_fraction or the number of different rows is too small"),
        (shared["rows"], _overlap_note(shared)),
        (same["rows"], f"{same['rows']} train rows share only their prompt with eval or test ({shown(same['ids'])})"),
        (shared["eval_in_test"], f"{shared['eval_in_test']} eval rows also stand in test"),
        (found["duplicates"], f"{found['duplicates']} train rows repeat an earlier one exactly"),
        (found["ignored_columns"], f"columns that are not used: {', '.join(found['ignored_columns'])}"),
        (
            partly["rows"],
            f"{partly['rows']} rows teach only some of their answers: the chat template rewrites the others",
        ),
        (
            special["rows"],
            f"warning: {special['rows']} rows hold special tokens in their text ({shown(special['ids'])})",
        ),
        (
            found["template_adds"],
            f"the chat template puts {found['template_adds']!r} before answers; it is learned too",
        ),
    ]
    return lines + [line for happened, line in told if happened]


def marked(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The example as text with what is learned between ⟦ and ⟧."""
    text, start = "", 0
    learned = [label != IGNORED for label in example.labels]
    for end in range(1, len(learned) + 1):
        if end == len(learned) or learned[end] != learned[start]:
            span = str(tokenizer.decode(example.input_ids[start:end]))
            text += f"⟦{span}⟧" if learned[start] else span
            start = end
    return text


def listed(ids: list[str]) -> Finding:
    """How many rows, and the first ids of them."""
    return {"rows": len(ids), "ids": ids[:_SHOWN]}


def shown(ids: list[str]) -> str:
    """Ids for one line."""
    return ", ".join(ids[:8]) + (", ..." if len(ids) > 8 else "")


def _file(source: str, rows: list[Row]) -> Finding:
    return {"source": source, "rows": len(rows), **(fingerprint(Path(source)) if is_file(source) else {})}


def _tokens(examples: list[Example]) -> Finding:
    """Token counts of the train examples."""
    learned = [example.supervised for example in examples]
    sizes = [len(example.input_ids) for example in examples]
    return {
        "examples": len(examples),
        "supervised_tokens": {
            "total": sum(learned),
            "mean": round(sum(learned) / len(learned), 1),
            "max": max(learned),
        },
        "prompt_tokens": sum(sizes) - sum(learned),
        "longest": max(sizes),
    }


def _over_length(found: Encoded) -> Finding:
    """Rows longer than max_length: all, dropped, cut at the start of their prompt."""
    ids = found.dropped + found.truncated
    over = {"of": len(found.examples) + len(found.dropped), "dropped": len(found.dropped), "cut": len(found.truncated)}
    return listed(ids) | over


def _over_length_note(part: str, over: Finding) -> str:
    done = [f"{over[key]} {key}" for key in ("dropped", "cut") if over[key]]
    cut = " at the start of the prompt" if over["cut"] else ""
    return f"{over['rows']} of {over['of']} {part} rows over length ({shown(over['ids'])}): {', '.join(done)}{cut}"


def _overlap_note(shared: Finding) -> str:
    done = "dropped from train" if shared["policy"] == "drop" else "warning: they are trained on"
    return f"{shared['rows']} train rows also stand in eval or test ({shown(shared['ids'])}): {done}"


def _with_special_tokens(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Rows whose text holds a special token, which would be read as one."""
    special = [token for token in tokenizer.all_special_tokens if token]
    texts = ((row, "\n".join(message["content"] for message in row.messages)) for row in rows)
    return [row.id for row, text in texts if any(token in text for token in special)]
