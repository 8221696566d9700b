"""The run's own held-out rows as an lm-eval task: zero-shot, or few-shot with worked examples as earlier turns."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig
from transformers import PreTrainedTokenizerBase

from llmtune.data.encode import IGNORED, Example, encode, prompt_ids
from llmtune.data.gate import Gate
from llmtune.data.rows import Row, read
from llmtune.evaluation.metrics import parsed, same
from llmtune.recipe.sections import Recipe

FEW_SHOT_SEED = 1234
_ANSWER_ROOM = 1.5
"""How much longer than the longest true answer an answer may be."""


@dataclass(frozen=True)
class Questions:
    """Held-out rows as a model reads them."""

    rows: list[Row]
    prompt_ids: list[list[int]]
    """The token ids that generation starts from."""
    prompts: list[str]
    """The same as text."""
    examples: list[Example]
    """The rows for the loss: only the last answer is supervised; rows longer than the context are left out."""
    of: int
    """Held-out rows that there are; the recipe may limit how many are used."""
    shots: list[str]
    """Ids of the worked examples."""


def questions(
    rows: Sequence[Row],
    shots: Sequence[Row],
    limit: int | None,
    tokenizer: PreTrainedTokenizerBase,
    stop: set[int],
    context: int,
) -> Questions:
    """Encode the first `limit` rows, each after the worked examples `shots`, for a context of `context` tokens."""
    complete = [_with_shots(shots, row) for row in rows[:limit]]
    ids = [prompt_ids(row.prompt, tokenizer) for row in complete]
    encoded = encode(complete, tokenizer, stop, context, "drop")
    lengths = {row.where: len(prompt) for row, prompt in zip(complete, ids, strict=True)}
    examples = [
        replace(example, labels=[IGNORED] * lengths[example.where] + example.labels[lengths[example.where] :])
        for example in encoded.examples
    ]
    prompts = [str(tokenizer.decode(prompt)) for prompt in ids]
    return Questions(complete, ids, prompts, examples, len(rows), [row.id for row in shots])


def worked_examples(recipe: Recipe, data: Gate, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Draw rows that are trained on, always the same ones; none for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        return []
    trained = {example.where for example in data.train}
    rows = [row for row in read(recipe.data.train) if row.where in trained]
    return random.Random(FEW_SHOT_SEED).sample(rows, min(recipe.eval.shots, len(rows)))


def answer_limit(questions: Questions) -> int:
    """Return how many tokens an answer may have: 1.5 times the longest true one, its stop token included."""
    return math.ceil(_ANSWER_ROOM * max((example.supervised for example in questions.examples), default=1))


def _with_shots(shots: Sequence[Row], row: Row) -> Row:
    """Put worked examples as earlier turns between a row's system message and its own turns."""
    system = row.messages[: int(row.messages[0]["role"] == "system")]
    turns = tuple(turn for shot in shots for turn in shot.messages if turn["role"] != "system")
    return replace(row, messages=(*system, *turns, *row.messages[len(system) :]))


class HeldOut(Task):
    """Greedy answers, scored by exact match; if every true answer is JSON, outputs are compared as parsed JSON."""

    VERSION = 1
    OUTPUT_TYPE = "generate_until"

    def __init__(self, name: str, questions: Questions, stop: set[int], new_tokens: int) -> None:
        self.questions = questions
        self.as_json = all(parsed(row.answer) is not None for row in questions.rows)
        self.generation = {"until": [], "do_sample": False, "max_gen_toks": new_tokens, "stop_ids": sorted(stop)}
        super().__init__()
        self._config = TaskConfig(task=name, num_fewshot=0, generation_kwargs=dict(self.generation))

    def download(self, *_: object, **__: object) -> None:
        """Nothing to fetch: the rows are here."""

    def has_training_docs(self) -> bool:
        """Return False: worked examples are part of the rows."""
        return False

    def has_validation_docs(self) -> bool:
        """Return False: the rows are the test documents."""
        return False

    def has_test_docs(self) -> bool:
        """Return True: the rows are the test documents."""
        return True

    def test_docs(self) -> list[dict[str, str]]:
        """Return one document a row: its id, prompt text and true answer."""
        pairs = zip(self.questions.rows, self.questions.prompts, strict=True)
        return [{"id": row.id, "prompt": prompt, "answer": row.answer} for row, prompt in pairs]

    def doc_to_text(self, doc: dict[str, str]) -> str:
        """Return the prompt, to which the chat template is applied already."""
        return doc["prompt"]

    def doc_to_target(self, doc: dict[str, str]) -> str:
        """Return the true answer."""
        return doc["answer"]

    def fewshot_context(self, doc: dict[str, str], *_: object, **__: object) -> str:
        """Return the prompt, which holds the worked examples already."""
        return doc["prompt"]

    def construct_requests(
        self, doc: dict[str, str], ctx: str, *, metadata: tuple[str, int, int], **_: object
    ) -> Instance:
        """Request one greedy generation."""
        return Instance("generate_until", doc, (ctx, dict(self.generation)), 0, metadata=metadata)

    def process_results(self, doc: dict[str, str], results: list[str]) -> dict[str, float]:
        """Score an answer: exact match, and if all true answers are JSON, whether it is valid JSON."""
        scores = {"exact_match": float(same(results[0], doc["answer"], self.as_json))}
        return scores | ({"valid_json": float(parsed(results[0]) is not None)} if self.as_json else {})

    def aggregation(self) -> dict[str, Any]:
        """Average both metrics over the rows."""
        return dict.fromkeys(("exact_match", "valid_json"), mean)

    def higher_is_better(self) -> dict[str, bool]:
        """Return True for both metrics."""
        return dict.fromkeys(("exact_match", "valid_json"), True)
