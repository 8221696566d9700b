"""What the checks of the data found: values for data.json, and lines for people."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from llmtune.data.encoding.template import template_sha256
from llmtune.data.example import IGNORED, Example
from llmtune.data.mixture import source_notes
from llmtune.data.near.notes import near_notes
from llmtune.data.overlap import Places
from llmtune.data.store.build import EncodedPart
from llmtune.data.store.encoded import EncodedRows
from llmtune.data.store.read import fingerprints
from llmtune.data.store.rows import StoredRows
from llmtune.errors import RecipeError, one_line
from llmtune.files import read_json
from llmtune.recipe.sections import Data
from llmtune.run import Run

Findings = dict[str, Any]
Parts = dict[str, StoredRows]
"""The rows of "train", "eval" and "test"."""

_LISTED_IDS, PRINTED_IDS = 20, 8
_LONGEST_NAME, _LONGEST_FORM = 80, 200
_UNLIMITED = 1 << 40  # tokenizers without a limit give an even larger model_max_length


def describe(
    data: Data, sources: Parts, rows: Parts, encoded: dict[str, EncodedPart], tokenizer: PreTrainedTokenizerBase
) -> Findings:
    """Collect counts, lengths, hashes and an example; `sources` are the rows read, `rows` those after the split."""
    train = encoded["train"]
    return {
        "rows": {part: len(part_rows) for part, part_rows in rows.items()},
        "files": _files(data, sources),
        "forms": list(dict.fromkeys(form for part_rows in sources.values() for form in part_rows.counts("form"))),
        "max_length": data.max_length,
        "tokenizer_limit": tokenizer.model_max_length if tokenizer.model_max_length < _UNLIMITED else None,
        **_count_tokens(train.examples),
        "over_length": {part: _over_length(result, len(rows[part])) for part, result in encoded.items()},
        "partly_learned": summarize_ids(train.notes.partly_learned),
        "encoding": train.notes.notes(),
        "duplicates": rows["train"].duplicates,
        "ignored_columns": sorted({name for part in sources.values() for name in part.ignored}),
        "special_tokens_in_text": summarize_ids(train.special),
        "template_adds": train.notes.template_adds,
        "thinking_block": train.notes.served_block,
        "template_sha256": template_sha256(tokenizer),
        "example": mark_learned(train.examples[0], tokenizer),
    }


def write_notes(findings: Findings) -> list[str]:
    """Turn the findings into notes for the user, one line each."""
    overlap, tokens = findings["overlap"], findings["supervised_tokens"]
    same_prompt, special = overlap["same_prompt"], findings["special_tokens_in_text"]
    partly, limit = findings["partly_learned"]["rows"], findings["tokenizer_limit"]
    count = findings["examples"]
    lines = [
        f"{tokens['total']} tokens to learn in {count} rows (mean {tokens['mean']}, max {tokens['max']})",
        f"max_length {findings['max_length']}; the longest row has {findings['longest']} tokens",
    ]
    lines = [*(f"rows: {one_line(form, _LONGEST_FORM)}" for form in findings["forms"]), *lines]
    lines = [*source_notes(findings["sources"], findings["shared_rows"]), *lines]
    lines += findings["encoding"]
    lines += [_over_length_note(part, over) for part, over in findings["over_length"].items() if over["rows"]]
    conditional = [
        (limit and findings["longest"] > limit, f"warning: the tokenizer says that the model takes {limit} tokens"),
        (findings["rows"]["eval"] == 0, "no validation rows: eval_fraction is 0, or train has too few different rows"),
        (overlap["rows"], _overlap_note(overlap)),
        (
            same_prompt["rows"],
            f"{same_prompt['rows']} train rows share only their prompt with eval or test "
            f"({format_ids(same_prompt['ids'])})",
        ),
        (overlap["eval_in_test"], f"{overlap['eval_in_test']} eval rows are also in test"),
        (findings["duplicates"], f"{findings['duplicates']} train rows repeat an earlier one exactly"),
        (findings["ignored_columns"], f"columns that are not used: {_names(findings['ignored_columns'])}"),
        (partly, f"{partly} rows teach only some of their answers: the chat template rewrites the others"),
        (
            special["rows"],
            f"warning: {special['rows']} rows have special tokens in their text ({format_ids(special['ids'])})",
        ),
        (
            findings["template_adds"],
            f"the chat template puts {findings['template_adds']!r} before answers; it is learned too",
        ),
    ]
    near = near_notes(findings.get("near_duplicates", {}), format_ids)
    return lines + [line for applies, line in conditional if applies] + near


def mark_learned(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode an example and put what is learned between ⟦ and ⟧."""
    text, start = "", 0
    learned = [label != IGNORED for label in example.labels]
    for end in range(1, len(learned) + 1):
        if end == len(learned) or learned[end] != learned[start]:
            span = str(tokenizer.decode(example.input_ids[start:end]))
            text += f"⟦{span}⟧" if learned[start] else span
            start = end
    return text


def summarize_ids(ids: list[str]) -> Findings:
    """Return the number of rows and the ids of the first 20."""
    return {"rows": len(ids), "ids": ids[:_LISTED_IDS]}


def summarize_rows(rows: StoredRows, places: Places) -> Findings:
    """Return the number of rows at these places and the ids of the first 20."""
    return {"rows": len(places), "ids": rows.ids(places[:_LISTED_IDS])}


def format_ids(ids: list[str]) -> str:
    """Format up to eight ids for one line."""
    return _names(ids[:PRINTED_IDS]) + (", ..." if len(ids) > PRINTED_IDS else "")


def check_same_data(run: Run, findings: Findings) -> None:
    """Raise RecipeError where the data files changed since the run was made; without its data.json nobody knows."""
    if not run.data_file.exists():
        return
    before, now = (
        {part: file.get("sha256") for part, file in measured["files"].items()}
        for measured in (read_json(run.data_file), findings)
    )
    if before != now:
        raise RecipeError(f"{run.path}: the data changed since this run was made; start a new one with --out")


def thinking_block(run: Run) -> str:
    """The empty thinking block behind which the answers start that a run learned; "" where there is none."""
    return str(read_json(run.data_file).get("thinking_block", "")) if run.data_file.exists() else ""


def _names(names: list[str]) -> str:
    """Join names that a user gave for one line."""
    return ", ".join(one_line(name, _LONGEST_NAME) for name in names)


def _files(data: Data, sources: Parts) -> Findings:
    """Describe the sources by their place in the data section: train, or train.0 of a mixture."""
    files: Findings = {}
    for part, rows in sources.items():
        measured, counts = fingerprints(data, part), rows.counts("source")
        for key, source in data.source_keys(part).items():
            count = counts.get(source) or counts.get("", 0)
            name = key.removeprefix("data.").removesuffix(".source")
            files[name] = {"source": source, "rows": count, **(measured[source] or {})}
    return files


def _count_tokens(examples: EncodedRows) -> Findings:
    total, learned = int(examples.lengths.sum()), int(examples.supervised.sum())
    return {
        "examples": len(examples),
        "supervised_tokens": {
            "total": learned,
            "mean": round(learned / len(examples), 1),
            "max": int(examples.supervised.max()),
        },
        "prompt_tokens": total - learned,
        "longest": int(examples.lengths.max()),
    }


def _over_length(encoded: EncodedPart, rows: int) -> Findings:
    """Count those of a part's rows that are over max_length: all, dropped, and cut at the start of their prompt."""
    dropped, cut = encoded.notes.dropped, encoded.notes.truncated
    counts = {"of": rows, "dropped": len(dropped), "cut": len(cut)}
    return summarize_ids(dropped + cut) | counts


def _over_length_note(part: str, over: Findings) -> str:
    actions = [f"{over[key]} {key}" for key in ("dropped", "cut") if over[key]]
    where = " at the start of the prompt" if over["cut"] else ""
    rows = f"{over['rows']} of {over['of']} {part} rows are longer than max_length ({format_ids(over['ids'])})"
    return f"{rows}: {', '.join(actions)}{where}"


def _overlap_note(overlap: Findings) -> str:
    action = "dropped from train" if overlap["policy"] == "drop" else "warning: they are trained on"
    return f"{overlap['rows']} train rows are also in eval or test ({format_ids(overlap['ids'])}): {action}"
