"""The held-out score while training goes on: greedy answers to validation rows, compared with the true ones."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.data.example import Example
from llmtune.data.row import Message, Row
from llmtune.errors import FieldError
from llmtune.evaluation.generate import greedy, rows_per_batch
from llmtune.evaluation.held_out.truth import TruthReader, kinds_of, same
from llmtune.evaluation.questions import ANSWER_ROOM, last_answer_alone
from llmtune.inference.room import in_halves
from llmtune.model.sharded import is_sharded_run
from llmtune.recipe.sections import Recipe
from llmtune.training.selection.best import SCORE, SHARDED, measure_of
from llmtune.working import working


class AnswerScore:
    """Exact match of greedy answers to some validation rows, compared as those to held-out rows are."""

    def __init__(
        self,
        examples: Sequence[Example],
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        stop: set[int],
        share: tuple[int, int],
    ) -> None:
        """`rows` are those of the examples; `share` is (process, processes): each answers some of them."""
        process, world = share
        self._stop, self.count = stop, len(examples)
        mine = [examples[index] for index in range(process, len(examples), world)]
        self._prompts = [list(example.input_ids[: example.prompt_size]) for example in mine]
        answers = [list(example.input_ids[example.prompt_size :]) for example in examples]
        self._new_tokens = int(ANSWER_ROOM * max(map(len, answers), default=1)) + 1
        questions = [last_answer_alone(example) for example in examples]
        self._reader = TruthReader(questions, tokenizer, stop)
        truths = [self._reader.read(self._asked(*pair), pair[1]) for pair in zip(rows, questions, strict=True)]
        self._true = list(zip(truths, kinds_of(truths), strict=True))[process::world]

    @torch.no_grad()
    def right(self, model: PreTrainedModel) -> int:
        """How many of this process's rows a model in evaluation mode answers exactly."""
        if not self._prompts:
            return 0
        longest = max(map(len, self._prompts)) + self._new_tokens
        size = rows_per_batch(model, len(self._prompts), longest)
        right = 0
        with working("answering validation rows", len(self._prompts), "rows", on_terminal=False) as step:
            for start in range(0, len(self._prompts), size):
                answers = in_halves(partial(self._answer, model), self._prompts[start : start + size], model)
                true = self._true[start : start + size]
                right += sum(
                    same(truth.compared(self._reader.text(ids)), truth.final, kind)
                    for (truth, kind), ids in zip(true, answers, strict=True)
                )
                step(len(answers))
        return right

    def _answer(self, model: PreTrainedModel, prompts: Sequence[list[int]]) -> list[list[int]]:
        return greedy(model, prompts, self._stop, self._new_tokens)

    def _asked(self, row: Row, example: Example) -> Row:
        """Return a conversation up to the answer that an example ends with: the last one whose words it has."""
        text = self._reader.text(example.input_ids[example.prompt_size :])
        turns = [place for place, turn in enumerate(row.messages) if turn["role"] == "assistant"]
        last = next((place for place in reversed(turns) if _is_in(row.messages[place], text)), turns[-1])
        return replace(row, messages=row.messages[: last + 1])


def _is_in(turn: Message, text: str) -> bool:
    """Tell whether a text has the words of a turn and the names of what it calls."""
    names = [call["function"]["name"] for call in turn.get("tool_calls") or ()]
    return all(words in text for words in (str(turn.get("content") or "").strip(), *names))


def check_validation(recipe: Recipe, examples: Sequence[Example]) -> None:
    """Raise FieldError where the best checkpoint is chosen by validation rows, and none of these can tell."""
    by = measure_of(recipe)
    if by and not examples:
        raise FieldError("train.keep_best", "there is no validation row to choose by; set data.eval")
    if by == SCORE:
        _questions(recipe, examples)


def _questions(recipe: Recipe, examples: Sequence[Example]) -> list[Example]:
    """Return the first eval.rows examples that are no plain texts; raises FieldError for none."""
    questions = list(islice((example for example in examples if not example.is_text), recipe.eval.rows))
    if not questions:
        raise FieldError("train.keep_best", "score needs questions, and the validation rows are plain texts; try loss")
    return questions


def answer_score(
    recipe: Recipe,
    examples: Sequence[Example],
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    stop: set[int],
    state: PartialState,
) -> AnswerScore | None:
    """What scores answers to the first eval.rows validation rows; None where the recipe chooses by no score.

    Raises FieldError where processes share one model.
    """
    if measure_of(recipe) != SCORE:
        return None
    if is_sharded_run():
        raise FieldError("train.keep_best", SHARDED)
    questions = _questions(recipe, examples)
    of_questions = _rows_of(questions, rows)
    return AnswerScore(questions, of_questions, tokenizer, stop, (state.process_index, state.num_processes))


def _rows_of(examples: Sequence[Example], rows: Iterable[Row]) -> list[Row]:
    """Return the row of each example, of which a conversation may have several; reads as few rows as it can."""
    missing, known = {example.where for example in examples}, dict[str, Row]()
    for row in rows:
        if row.where in missing:
            missing.remove(row.where)
            known[row.where] = row
        if not missing:
            break
    return [known[example.where] for example in examples]
