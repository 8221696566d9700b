"""The findings on near duplicates of a recipe's rows, and the lines that tell them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmtune.data.near.duplicates import near_documents, near_duplicates
from llmtune.data.near.texts import Documents, RowTexts
from llmtune.data.row import Row


def find_near(rows: Mapping[str, Sequence[Row]], documents: Documents) -> dict[str, Any]:
    """Find train rows that are nearly the same as an earlier one, as rows of eval or test, or as a suite's documents.

    They are told and stay where they are.
    """
    others = {part: RowTexts(rows[part]) for part in ("eval", "test") if rows[part]}
    if rows["test"] is rows["eval"]:
        others.pop("test", None)
    findings = near_duplicates(RowTexts(rows["train"]), others)
    if documents.texts:
        near, checked = near_documents(RowTexts(rows["train"], questions=True), documents.texts)
        findings["suite"], findings["checked"]["suite"] = near, checked
    return findings | {"not_at_hand": documents.not_at_hand}


def near_notes(findings: Mapping[str, Any], names: Callable[[list[str]], str]) -> list[str]:
    """Tell of near duplicates, one line for each place where there are any; `names` joins ids."""
    words = {
        "train": "{} train rows are nearly the same as an earlier one, or exactly so ({})",
        "eval": "warning: {} train rows are nearly the same as rows of eval ({})",
        "test": "warning: {} train rows are nearly the same as rows of test ({})",
        "suite": "warning: {} train rows are nearly the same as documents of the suite ({})",
    }
    lines = [
        line.format(findings[part]["rows"], names(findings[part]["ids"]))
        for part, line in words.items()
        if findings.get(part, {}).get("rows")
    ]
    drawn = [
        f"{one['rows']:,} of {one['of']:,} rows of {part}"
        for part, one in findings.get("checked", {}).items()
        if one["rows"] < one["of"]
    ]
    return lines + ([f"near duplicates are looked for among drawn rows: {', '.join(drawn)}"] if drawn else [])
