"""What became of the rows: how many answers are right, which rows were not asked, and the lines that say so."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmtune.answering.journal import Answer
from llmtune.data.findings import format_ids
from llmtune.evaluation.held_out.fields import Kind
from llmtune.evaluation.held_out.truth import Truth, kinds_of, same


class Scorer:
    """Compares answers with the true ones, as evaluation does."""

    def __init__(self, truths: Mapping[int, Truth]) -> None:
        self.truths = truths
        self.kinds: dict[int, Kind] = dict(zip(truths, kinds_of(list(truths.values())), strict=True))

    def matches(self, row: int, answers: Sequence[Answer]) -> list[bool] | None:
        """Whether each answer to a row is the true one; None where none is given."""
        truth = self.truths.get(row)
        if truth is None:
            return None
        return [same(truth.compared(one.text), truth.final, self.kinds[row]) for one in answers]


class Tally:
    """Counts one model's answers."""

    def __init__(self) -> None:
        self.answers = self.tokens = self.at_limit = self.right = self.compared = self.rows = self.rows_right = 0

    def add(self, answers: Sequence[Answer], matches: Sequence[bool] | None, room: int) -> None:
        """Count the answers to a row."""
        self.answers += len(answers)
        self.tokens += sum(one.tokens for one in answers)
        self.at_limit += sum(one.tokens >= room for one in answers)
        if matches is not None:
            self.rows += 1
            self.rows_right += any(matches)
            self.compared += len(matches)
            self.right += sum(matches)

    def facts(self) -> dict[str, Any]:
        """The counts as the summary keeps them."""
        counts: dict[str, Any] = {"answers": self.answers, "tokens": self.tokens, "at_limit": self.at_limit}
        if not self.compared:
            return counts
        value = self.right / self.compared
        match = {"value": value, "right": self.right, "of": self.compared}
        several = {"rows_right": self.rows_right, "rows": self.rows} if self.compared > self.rows else {}
        return {**counts, "exact_match": match | several}


def lines(summary: Mapping[str, Any]) -> list[str]:
    """Say in lines what a summary holds."""
    text = [_model_line(name, facts) for name, facts in summary["models"].items()]
    errors = summary["errors"]
    if errors:
        ids = format_ids([one["id"] for one in errors])
        rows = f"{len(errors)} of {summary['rows']} rows were not answered ({ids})"
        text.append(f"warning: {rows}: {errors[0]['error']}")
    return [*text, f"answers  {summary['out']}"]


def _model_line(name: str, facts: Mapping[str, Any]) -> str:
    parts = [f"{facts['answers']} answers"]
    match = facts.get("exact_match")
    if match:
        parts.append(f"exact match {match['value']:.1%} ({match['right']} of {match['of']})")
        if "rows" in match:
            parts.append(f"at least one right in {match['rows_right']} of {match['rows']} rows")
    if facts["at_limit"]:
        parts.append(f"{facts['at_limit']} cut at the limit of tokens")
    return f"{name}: {', '.join(parts)}"
