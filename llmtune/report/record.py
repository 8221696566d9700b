"""The report's record: what the checks found in the data, the merge's proof, and every file with its hash."""

import re
from typing import Any

from llmtune.numbers import number, size
from llmtune.report.html import Html, facts, join, section, table, tag

Found = dict[str, Any]

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
_MERGE_APART = {"files", "base", "gap", "bound", "shift"}


def data_section(found: Found) -> Html:
    """What was learned from, what the checks found, and one row as the model sees it."""
    if not found:
        return section("Data", note="The run holds no findings on its data yet.")
    others = {key: one for key, one in found.items() if key not in _SHOWN_APART and one not in (None, "", [], {})}
    rest = [(key.replace("_", " "), _finding(value)) for key, value in others.items()]
    notes = tag("ul", *(tag("li", note) for note in found["notes"])) if found.get("notes") else None
    return section("Data", facts([*_tokens(found), *rest]), notes, _files(found.get("files") or {}), _example(found))


def _tokens(found: Found) -> list[tuple[str, object]]:
    learned, longest, limit = found.get("supervised_tokens"), found.get("longest"), found.get("max_length")
    total = learned.get("total") if isinstance(learned, dict) else learned
    spread = f", {learned['mean']} a row, at most {learned['max']}" if isinstance(learned, dict) else ""
    of_prompts = f"; {found['prompt_tokens']:,} more are prompt" if found.get("prompt_tokens") is not None else ""
    rows = ", ".join(f"{count:,} {part}" for part, count in (found.get("rows") or {}).items())
    return [
        ("rows", rows or None),
        ("learned tokens", None if total is None else f"{total:,}{spread}{of_prompts}"),
        ("longest row", None if longest is None else f"{longest:,} tokens; max_length is {limit:,}"),
    ]


def _finding(value: Any) -> object:
    """A finding as text: names and values of an object, the number and the first of a list."""
    if isinstance(value, dict):
        if set(value) == {"rows", "ids"} and not value["ids"]:
            return number(value["rows"])
        parts = [(key.replace("_", " "), one) for key, one in value.items() if one not in (None, [], {})]
        simple = not any(isinstance(one, dict) and one.get("ids") != [] for _, one in parts)
        told = [join(tag("span", f"{name} ", class_="quiet"), _finding(one)) for name, one in parts]
        return join(*_between(told, ", ")) if simple else join(*(tag("div", one) for one in told))
    if isinstance(value, list):
        return ", ".join(number(one) for one in value[:8]) + (", ..." if len(value) > 8 else "")
    return number(value)


def _between(parts: list[Html], comma: str) -> list[str]:
    return [piece for part in parts for piece in (comma, part)][1:]


def _files(files: Found) -> Html | None:
    if not files:
        return None
    rows: list[list[object]] = [
        [part, one.get("source"), number(one.get("rows")), _bytes(one), _hash(one)] for part, one in files.items()
    ]
    return table(["", "source", "rows", "size", "SHA-256"], rows, {2, 3})


def _example(found: Found) -> Html | None:
    """The first training row as the model reads it, with what it learns marked."""
    if not found.get("example"):
        return None
    pieces = re.split("⟦(.*?)⟧", found["example"], flags=re.DOTALL)
    shown = [tag("mark", piece) if index % 2 else piece for index, piece in enumerate(pieces)]
    caption = "One training row as the model reads it. What it learns to write is marked."
    return tag("figure", tag("div", *shown, class_="text boxed"), tag("figcaption", caption))


def merge_section(manifest: Found) -> Html:
    """The largest logit gap between the live tuned model and the merged one, and what else the merge wrote down."""
    done = manifest["steps"].get("merge")
    if done is None:
        return section("Merge", note="Not merged yet.")
    told: list[tuple[str, object]] = []
    if "gap" in done:
        bound = f" (allowed: {number(done['bound'])})" if "bound" in done else ""
        told.append(("largest logit gap", f"{number(done['gap'])}{bound}"))
    if "shift" in done:
        told.append(("for comparison", f"training moved logits by up to {number(done['shift'])}"))
    told += [(key.replace("_", " "), _finding(value)) for key, value in done.items() if key not in _MERGE_APART]
    return section(
        "Merge", facts(told), note="Base and delta as one set of full weights, compared with the live model."
    )


def files_section(manifest: Found) -> Html:
    """Every file that a finished step left, with its size and SHA-256."""
    rows: list[list[object]] = [
        [tag("code", name), step, _bytes(one), _hash(one)]
        for step, done in manifest["steps"].items()
        if step != "report"
        for name, one in done["files"].items()
    ]
    if not rows:
        return section("Files", note="No step has finished yet.")
    return section("Files", table(["file", "step", "size", "SHA-256"], rows, {2}))


def _bytes(one: Found) -> str | None:
    return size(one["bytes"]) if "bytes" in one else None


def _hash(one: Found) -> Html | None:
    return tag("code", one["sha256"], class_="hash") if "sha256" in one else None
