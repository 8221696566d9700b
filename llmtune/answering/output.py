"""The rows with their answers as a file of JSON lines, and the summary beside it."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from llmtune.answering.batches import Ask
from llmtune.answering.journal import Answer, Journal
from llmtune.answering.prepare import Prepared
from llmtune.answering.request import Request
from llmtune.answering.rows import AskedRow, line_of, with_answer
from llmtune.answering.summary import Scorer, Tally
from llmtune.data.formats.base import Record
from llmtune.errors import RecipeError
from llmtune.files import fingerprint, write_file, write_json

MATCH, ERROR = "exact_match", "error"
"""Columns that say whether each model's answer is the true one, and why a row was not answered."""


def columns(request: Request) -> tuple[str, ...]:
    """The columns that a request adds to records."""
    return (*request.models, MATCH, ERROR)


class Output:
    """Puts answers to the records that they belong to, and counts them."""

    def __init__(self, request: Request, prepared: Prepared, journal: Journal, room: int, context: int) -> None:
        self.request, self.prepared, self.journal = request, prepared, journal
        self._room, self._context = room, context
        self._scorer = Scorer(prepared.truths)
        self.tallies = {name: Tally() for name in request.models}
        self.errors: list[dict[str, str]] = []

    def write(self, rows: Iterable[AskedRow], digest: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write file and summary, and return the summary; raises RecipeError where the rows are others by now."""
        seen = hashlib.sha256()
        with write_file(self.request.out) as partial:
            with partial.open("w", encoding="utf-8") as file:
                for place, one in enumerate(rows):
                    seen.update(line_of(one.record).encode())
                    file.write(line_of(self._answered(place, one)))
            if seen.hexdigest() != digest:
                raise RecipeError(f"{self.request.rows}: was changed while it was answered; start again")
            summary = self._summary(facts) | {"file": fingerprint(partial)}
            write_json(self.request.summary, summary)  # first: a file without one is taken for another program's
        return summary

    def _answered(self, place: int, one: AskedRow) -> Record:
        """Return a record with its answers; the first one also where the record's format has an answer."""
        if place in self.prepared.errors:
            self.errors.append({"id": one.row.id, "error": self.prepared.errors[place]})
            return {**one.record, ERROR: self.prepared.errors[place]}
        added: Record = {}
        matches: dict[str, Any] = {}
        room = min(self._room, self._context - len(self.prepared.prompts[place]))
        for name, tally in self.tallies.items():
            answers = self._answers(name, place)
            right = self._scorer.matches(place, answers)
            tally.add(answers, right, room)
            added[name] = self._alone([answer.text for answer in answers])
            if right is not None:
                matches[name] = self._alone(right)
        first = self._answers(self.request.models[-1], place)[0].text
        return {**with_answer(one.record, one.place, first), **added, **({MATCH: matches} if matches else {})}

    def _answers(self, name: str, place: int) -> list[Answer]:
        """The answers of a model to a row."""
        return [self.journal.of(name)[Ask(place, sample)] for sample in range(self.request.samples)]

    def _alone(self, values: list[Any]) -> Any:
        """A list as it is; where one answer is asked for, that one."""
        return values if self.request.samples > 1 else values[0]

    def _summary(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        models = {name: tally.facts() for name, tally in self.tallies.items()}
        rows = len(self.prepared.prompts)
        named = {"rows": rows, "source": self.request.rows, "out": str(self.request.out)}
        return {**named, "models": models, "errors": self.errors, **facts}
