"""The page of a comparison: who wins and why, every arm in a table, and what its numbers look like."""

from pathlib import Path

from llmtune import __version__
from llmtune.arms.record import Comparison
from llmtune.arms.stored import read_comparison
from llmtune.arms.table import table as rows_of
from llmtune.arms.verdict import Verdict, conclude
from llmtune.files import write_text
from llmtune.numbers import count, duration
from llmtune.reporting.comparison.sections import (
    advantages_section,
    cost_section,
    curves_section,
    plans_section,
    search_section,
    sizes_section,
    table_section,
)
from llmtune.reporting.document import document
from llmtune.reporting.html import Html, facts, section, tag
from llmtune.reporting.values import number, text, whole

PAGE = "index.html"


def write_page(comparison: Comparison, verdict: Verdict, page: Path) -> None:
    """Write the page of a comparison, as far as that has come, into its folder."""
    write_text(page, render(comparison, verdict, page.parent))


def draw_again(folder: Path) -> Path:
    """Write the page of a comparison's folder anew and return its path.

    Raises RecipeError where the folder holds no comparison that can be read.
    """
    comparison = read_comparison(folder)
    write_page(comparison, conclude(comparison), folder / PAGE)
    return folder / PAGE


def render(comparison: Comparison, verdict: Verdict, folder: Path) -> str:
    """Return the page of a comparison and of what it says; `folder` is where its runs lie."""
    size = verdict.get("size") or max((one["size"] for one in comparison["arms"]), default=1.0)
    base = text(comparison["base"].get("name")) or "a base"
    name = f"Methods compared on {base.rstrip('/').rsplit('/', 1)[-1].removeprefix('package:')}"
    body: list[Html | None] = [
        tag("h1", name, dir="auto"),
        _lede(verdict),
        _verdict_section(verdict),
        table_section(comparison, rows_of(comparison, verdict), size, folder),
        advantages_section(verdict),
        cost_section(comparison, verdict),
        curves_section(comparison, size),
        sizes_section(comparison, verdict),
        search_section(comparison, size),
        plans_section(comparison, size),
        section("What was compared", facts(_facts(comparison, base))),
        tag("footer", f"Written by llmtune {__version__}. This page is one file and loads nothing."),
    ]
    return document(name, body)


def _lede(verdict: Verdict) -> Html:
    winner = verdict["winner"]
    return tag("p", f"{winner} wins" if winner else "No arm wins so far", class_="lede")


def _facts(comparison: Comparison, base: str) -> list[tuple[str, object]]:
    parameters, rows = number(comparison["base"].get("parameters")), whole(comparison["train"].get("rows"))
    held_out, source = whole(comparison["held_out"].get("n")), text(comparison["held_out"].get("source"))
    shared = "the same minutes" if comparison["equal"] == "minutes" else "the same epochs"
    saved = sum(comparison.get("saved", {}).values())
    return [
        ("base", f"{base}, {count(parameters)} parameters" if parameters else base),
        ("trained on", f"{rows:,} rows" if rows else None),
        ("held out", f"{held_out:,} rows{f' of {source}' if source else ''}" if held_out else None),
        ("budget", f"{comparison['minutes']:g} minutes in all, {shared} for each arm"),
        ("seeds", ", ".join(map(str, comparison["seeds"])) or None),
        ("saved", f"{duration(saved)} by what arms share" if saved >= 1 else None),
    ]


def _verdict_section(verdict: Verdict) -> Html:
    sentences = (tag("p", sentence) for sentence in verdict["sentences"])
    notes = [tag("li", f"{note}.") for note in verdict["notes"]]
    return section("Who wins, and why", *sentences, tag("ul", *notes, class_="note") if notes else None)
