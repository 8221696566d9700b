"""Rows as prompts of token ids, with the true answers where they are given, before any model is loaded."""

import itertools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llmtune.answering.models import Prompts
from llmtune.answering.opening import Opening
from llmtune.answering.rows import AskedRow
from llmtune.data.encoding.boundaries import missing_bos, tokenize
from llmtune.data.encoding.rules import Rules
from llmtune.data.row import Row
from llmtune.errors import RecipeError
from llmtune.evaluation.held_out.truth import Truth
from llmtune.evaluation.questions import Questions, Survey, answer_room, questions
from llmtune.working import Step

USUAL_ROOM = 256
"""Tokens that an answer may have where no row says how long one is."""
_BATCH = 1000


@dataclass
class Prepared:
    """What is to be known of all rows before any is answered."""

    prompts: list[Sequence[int]] = field(default_factory=list)
    """The token ids that each answer starts from; empty where the row cannot be asked."""
    errors: dict[int, str] = field(default_factory=dict)
    """Why a row cannot be asked, by its place."""
    truths: dict[int, Truth] = field(default_factory=dict)
    """The true answers, by the place of the row."""
    keeps_special: bool = False
    """Whether answers keep their special tokens, as the true ones have some."""
    survey: Survey = field(default_factory=Survey)

    def room(self, context: int) -> int:
        """Return how many tokens an answer may have where the user does not say: as in evaluation, or the usual."""
        return answer_room(self.survey, context) if self.truths else min(USUAL_ROOM, context - 1)


class Preparer:
    """Turns rows into prompts: those with an answer as evaluation does, the others as chat does."""

    def __init__(self, prompts: Prompts, rules: Rules, opening: Opening) -> None:
        self.prompts, self.rules, self.opening = prompts, rules, opening
        self.prepared = Prepared()

    def prepare(self, rows: Iterable[AskedRow], step: Step) -> Prepared:
        """Return the prompts of all rows; raises RecipeError where no row of the first thousand can be asked."""
        rest = iter(rows)
        while batch := list(itertools.islice(rest, _BATCH)):
            self._add(batch)
            step(len(batch))
            prompts, errors = self.prepared.prompts, self.prepared.errors
            if len(errors) == len(prompts):
                raise RecipeError(f"no row can be asked: {batch[0].row.where}: {errors[0]}")
        return self.prepared

    def _add(self, batch: list[AskedRow]) -> None:
        start = len(self.prepared.prompts)
        scored = [self.opening.put_before(one.row) for one in batch if one.is_answered and one.row.messages]
        encoded: dict[str, tuple[Sequence[int], Truth]] = {}
        for one in self._questions(scored):
            self.prepared.survey.add(one)
            self.prepared.keeps_special |= one.special
            for row, ids, truth in zip(one.rows, one.prompt_ids, one.truths, strict=True):
                encoded[row.where] = (ids, truth)
        for place, one_row in enumerate(batch, start):
            if one_row.row.where in encoded:
                ids, self.prepared.truths[place] = encoded[one_row.row.where]
            else:
                ids = self._prompt(one_row, place)
            self.prepared.prompts.append(array("i", ids))

    def _questions(self, rows: list[Row]) -> list[Questions]:
        """Encode rows with answers as evaluation does; one that it cannot ask is left out."""
        if not rows:
            return []
        try:
            return [questions(rows, [], None, self.prompts.tokenizer, self.prompts.stop, self.rules)]
        except RecipeError:
            half = len(rows) // 2
            return self._questions(rows[:half]) + self._questions(rows[half:]) if half else []

    def _prompt(self, asked: AskedRow, place: int) -> list[int]:
        """Return the prompt of a row without a true answer; none, and an error, where it cannot be asked."""
        try:
            ids = self._ids(asked.row)
        except RecipeError as error:
            self.prepared.errors[place] = str(error).removeprefix("these messages: ")
            return []
        if len(ids) < self.rules.max_length:
            return ids
        reason = f"the prompt has {len(ids)} tokens, and the model's context {self.rules.max_length}"
        self.prepared.errors[place] = reason
        return []

    def _ids(self, row: Row) -> list[int]:
        tokenizer = self.prompts.tokenizer
        if row.text is not None and self.opening.continues_texts:
            ids = tokenize(tokenizer, [row.text])[0]
            return missing_bos(tokenizer, ids) + ids
        conversation = self.opening.put_before(row)
        return self.prompts.ids(conversation.prompt, conversation.tools)
