"""The report on data, merge and files: what the checks found, the merge's proof, every file with its hash."""

import re
from typing import Any

from llmtune.numbers import number, size
from llmtune.reporting.html import Html, facts, join, section, table, tag

JSON = dict[str, Any]
"""A JSON object as data.json or the manifest hold it."""

_SHOWN_APART = {
    "rows",
    "examples",
    "files",
    "supervised_tokens",
    "prompt_tokens",
    "longest",
    "max_length",
    "example",
    "notes",
}
_MERGE_APART = {"files", "base", "gap", "bound", "shift", "bytes"}
_TITLES = {
    "tokenizer_limit": "tokenizer's own limit, tokens",
    "over_length": "rows longer than max_length",
    "partly_learned": "rows of which only the last answer is learned",
    "duplicates": "duplicate rows",
    "overlap": "overlap of training and held-out rows",
    "ignored_columns": "columns that are not used",
    "special_tokens_in_text": "rows with special tokens in their text",
    "template_adds": "the chat template puts before answers",
    "template_sha256": "chat template, SHA-256",
    "mean_gap": "mean logit gap",
    "gap_in_memory": "largest gap after adding the delta in fp32",
    "gap_on_disk": "largest gap after writing and reading",
    "rounding": "largest gap after random changes as small as rounding",
    "largest_logit": "largest logit",
    "changed": "tensors that differ from the base",
    "dtype": "stored in",
    "gap_to_4bit": "gap to the model with the 4-bit base",
    "merged_into": "merged into the base that is",
}
"""Titles of the keys that data.json and the manifest hold; any other key is shown with spaces."""


def data_section(findings: JSON) -> Html:
    """Show the training data: rows, tokens, what the checks found, and one row as the model reads it."""
    if not findings:
        return section("Data", note="The data is not checked yet.")
    others = {key: one for key, one in findings.items() if key not in _SHOWN_APART and one not in (None, "", [], {})}
    rest = [(_title(key), _finding(value)) for key, value in others.items()]
    notes = tag("ul", *(tag("li", note) for note in findings["notes"])) if findings.get("notes") else None
    pairs = facts([*_tokens(findings), *rest])
    return section("Data", pairs, notes, _files(findings.get("files") or {}), _example(findings))


def _title(key: str) -> str:
    return _TITLES.get(key, key.replace("_", " "))


def _tokens(findings: JSON) -> list[tuple[str, object]]:
    learned, longest, limit = (findings.get(key) for key in ("supervised_tokens", "longest", "max_length"))
    total = learned.get("total") if isinstance(learned, dict) else learned
    spread = f", {learned['mean']} a row, at most {learned['max']}" if isinstance(learned, dict) else ""
    prompts = findings.get("prompt_tokens")
    of_prompts = f"; {prompts:,} more are prompt" if prompts is not None else ""
    rows = ", ".join(f"{count:,} {part}" for part, count in (findings.get("rows") or {}).items())
    return [
        ("rows", rows or None),
        ("learned tokens", None if total is None else f"{total:,}{spread}{of_prompts}"),
        ("longest row", None if longest is None else f"{longest:,} tokens; max_length is {limit:,}"),
    ]


def _finding(value: object) -> object:
    """Show a JSON value: an object as names and values, of a list the first eight items."""
    if isinstance(value, dict):
        if set(value) == {"rows", "ids"} and not value["ids"]:
            return number(value["rows"])
        parts = [(key.replace("_", " "), one) for key, one in value.items() if one not in (None, [], {})]
        simple = not any(isinstance(one, dict) and one.get("ids") != [] for _, one in parts)
        shown = [join(tag("span", f"{name} ", class_="quiet"), _finding(one)) for name, one in parts]
        return join(*_separated(shown, ", ")) if simple else join(*(tag("div", part) for part in shown))
    if isinstance(value, list):
        return ", ".join(number(one) for one in value[:8]) + (", ..." if len(value) > 8 else "")
    return number(value)


def _separated(parts: list[Html], separator: str) -> list[str]:
    return [piece for part in parts for piece in (separator, part)][1:]


def _files(files: JSON) -> Html | None:
    if not files:
        return None
    rows: list[list[object]] = [
        [part, one.get("source"), number(one.get("rows")), _bytes(one), _hash(one)] for part, one in files.items()
    ]
    return table(["", "source", "rows", "size", "SHA-256"], rows, {2, 3})


def _example(findings: JSON) -> Html | None:
    """Show the first training row as the model reads it, with what it learns marked."""
    if not findings.get("example"):
        return None
    pieces = re.split("⟦(.*?)⟧", findings["example"], flags=re.DOTALL)
    shown = [tag("mark", piece) if index % 2 else piece for index, piece in enumerate(pieces)]
    caption = "One training row as the model reads it. What it learns to write is marked."
    return tag("figure", tag("div", *shown, class_="text boxed"), tag("figcaption", caption))


def merge_section(manifest: JSON) -> Html:
    """Show the largest logit gap between the live tuned model and the merged one, and the rest of the proof."""
    done = manifest["steps"].get("merge")
    if done is None:
        return section("Merge", note="Not merged yet.")
    pairs: list[tuple[str, object]] = []
    if "gap" in done:
        bound = f" (allowed: {number(done['bound'])})" if "bound" in done else ""
        pairs.append(("largest logit gap", f"{number(done['gap'])}{bound}"))
    if "shift" in done:
        pairs.append(("for comparison", f"training moved logits by up to {number(done['shift'])}"))
    pairs.append(("size", _bytes(done)))
    pairs += [(_title(key), _finding(value)) for key, value in done.items() if key not in _MERGE_APART]
    note = "Base and delta as one set of full weights, compared with the live tuned model."
    return section("Merge", facts(pairs), note=note)


def files_section(manifest: JSON) -> Html:
    """List every file that a finished step wrote, with its size and SHA-256."""
    rows: list[list[object]] = [
        [tag("code", name), step, _bytes(one), _hash(one)]
        for step, done in manifest["steps"].items()
        if step != "report"
        for name, one in done["files"].items()
    ]
    if not rows:
        return section("Files", note="No step has finished yet.")
    return section("Files", table(["file", "step", "size", "SHA-256"], rows, {2}))


def _bytes(facts: JSON) -> str | None:
    return size(facts["bytes"]) if "bytes" in facts else None


def _hash(facts: JSON) -> Html | None:
    return tag("code", facts["sha256"], class_="hash") if "sha256" in facts else None
