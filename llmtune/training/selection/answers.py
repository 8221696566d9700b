"""The held-out score while training goes on: greedy answers to validation rows, compared with the true ones."""

from collections.abc import Sequence
from itertools import islice

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.data.example import Example
from llmtune.errors import FieldError
from llmtune.evaluation.generate import greedy, left_padded, rows_per_batch, shares_start
from llmtune.evaluation.held_out.truth import Kind, Truth, kinds_of, same
from llmtune.evaluation.questions import ANSWER_ROOM
from llmtune.model.sharded import is_sharded_run
from llmtune.recipe.sections import Recipe
from llmtune.training.selection.best import SCORE, SHARDED, measure_of
from llmtune.working import working


class AnswerScore:
    """Exact match of greedy answers to some validation rows; of JSON, where every true answer is JSON."""

    def __init__(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, stop: set[int], share: tuple[int, int]
    ) -> None:
        """`share` is (process, processes): each answers some of the rows."""
        process, world = share
        self._tokenizer, self._stop, self.count = tokenizer, stop, len(examples)
        mine = [examples[index] for index in range(process, len(examples), world)]
        self._prompts = [list(example.input_ids[: example.prompt_size]) for example in mine]
        answers = [list(example.input_ids[example.prompt_size :]) for example in examples]
        self._new_tokens = int(ANSWER_ROOM * max(map(len, answers), default=1)) + 1
        truths = [Truth.of_text(self._text(answer)) for answer in answers]
        kinds = kinds_of(truths)
        self._kind: Kind = kinds[0] if kinds else "text"
        self._true = truths[process::world]

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
                answers = self._answer(model, self._prompts[start : start + size])
                true = self._true[start : start + size]
                texts = (truth.compared(self._text(ids)) for truth, ids in zip(true, answers, strict=True))
                pairs = zip(texts, true, strict=True)
                right += sum(same(text, truth.final, self._kind) for text, truth in pairs)
                step(len(answers))
        return right

    def _answer(self, model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
        if shares_start(model):
            return greedy(model, prompts, self._stop, self._new_tokens)
        ids, mask = left_padded(prompts, model.device)
        output = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=self._new_tokens,
            eos_token_id=sorted(self._stop),
            pad_token_id=self._tokenizer.pad_token_id,
        )
        return [self._until_stop(row[ids.shape[1] :].tolist()) for row in output]

    def _until_stop(self, tokens: list[int]) -> list[int]:
        end = next((place for place, token in enumerate(tokens) if token in self._stop), len(tokens))
        return tokens[:end]

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode([token for token in tokens if token not in self._stop])).strip()


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
    return AnswerScore(_questions(recipe, examples), tokenizer, stop, (state.process_index, state.num_processes))
