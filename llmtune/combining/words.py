"""A combination in words, for the terminal, the report and the model card."""

from collections.abc import Mapping
from typing import Any

from llmtune.combining.request import HOW


def combined_words(combined: Mapping[str, Any]) -> str:
    """Say from which runs a delta was combined, and how: combined from a (weight 0.7) and b (weight 0.3) by TIES."""
    parts = [f"{one['name']} (weight {one['weight']:g})" for one in combined["runs"]]
    more = [f"density {combined['density']:g}"] if combined.get("density") else []
    more += [f"seed {combined['seed']}"] if combined.get("seed") is not None else []
    of = " of their deltas" if combined["how"] == "linear" else ""
    by = f"{HOW[combined['how']]}{of}" + (f" ({', '.join(more)})" if more else "")
    return f"combined from {', '.join(parts[:-1])} and {parts[-1]} by {by}"


def overlap_words(combined: Mapping[str, Any]) -> list[str]:
    """A line for each run that trained on rows that the first run holds out."""
    held_out = combined.get("held_out") or {}
    first, rows = combined["runs"][0]["name"], held_out.get("rows")
    return [
        f"{count:,} of {rows:,} held-out rows of {first} are training rows of {name}: "
        "scores on them are better than on new rows"
        for name, count in (held_out.get("trained") or {}).items()
        if count
    ]
