"""The run's own held-out rows as an lm-eval task: asked plainly, or after worked examples as earlier turns."""

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
from llmtune.evaluate.metrics import parsed, same
from llmtune.recipe.sections import Recipe

FEW_SHOT_SEED = 1234
ROOM = 1.5


@dataclass(frozen=True)
class Questions:
    """Held-out rows as a model sees them."""

    rows: list[Row]
    starts: list[list[int]]
    """What generation starts from, as token ids."""
    prompts: list[str]
    """The same as text."""
    examples: list[Example]
    """What the loss is of: the last answer only; rows that are longer than the context are missing."""
    of: int
    """Rows that there are; fewer are asked where the recipe limits them."""
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
    """The first `limit` rows, each after the worked examples, encoded for a model with that many tokens of context."""
    asked = [_after(shots, row) for row in rows[:limit]]
    starts = [prompt_ids(row.prompt, tokenizer) for row in asked]
    encoded = encode(asked, tokenizer, stop, context, "drop")
    lengths = {row.where: len(start) for row, start in zip(asked, starts, strict=True)}
    examples = [
        replace(example, labels=[IGNORED] * lengths[example.where] + example.labels[lengths[example.where] :])
        for example in encoded.examples
    ]
    prompts = [str(tokenizer.decode(start)) for start in starts]
    return Questions(asked, starts, prompts, examples, len(rows), [row.id for row in shots])


def worked_examples(recipe: Recipe, data: Gate, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Rows drawn from what is trained on, the same ones each time; none where the tokenizer knows no turns."""
    if not tokenizer.chat_template:
        return []
    trained = {example.where for example in data.train}
    rows = [row for row in read(recipe.data.train) if row.where in trained]
    return random.Random(FEW_SHOT_SEED).sample(rows, min(recipe.eval.shots, len(rows)))


def room(questions: Questions) -> int:
    """Tokens that an answer may have: half as many again as the longest true one, its stop token included."""
    return math.ceil(ROOM * max((example.supervised for example in questions.examples), default=1))


def _after(shots: Sequence[Row], row: Row) -> Row:
    """The row with worked examples as earlier turns, behind its own system message."""
    system = row.messages[: int(row.messages[0]["role"] == "system")]
    turns = tuple(turn for shot in shots for turn in shot.messages if turn["role"] != "system")
    return replace(row, messages=(*system, *turns, *row.messages[len(system) :]))


class HeldOut(Task):
    """Greedy answers to the rows, scored by exact match; as parsed JSON where every true answer is JSON."""

    VERSION = 1
    OUTPUT_TYPE = "generate_until"

    def __init__(self, name: str, asked: Questions, stop: set[int], new_tokens: int) -> None:
        self.asked = asked
        self.as_json = all(parsed(row.answer) is not None for row in asked.rows)
        self.generation = {"until": [], "do_sample": False, "max_gen_toks": new_tokens, "stop_ids": sorted(stop)}
        super().__init__()
        self._config = TaskConfig(task=name, num_fewshot=0, generation_kwargs=dict(self.generation))

    def download(self, *_: Any, **__: Any) -> None:
        """Nothing to fetch: the rows are here."""

    def has_training_docs(self) -> bool:
        """No: worked examples are part of the rows."""
        return False

    def has_validation_docs(self) -> bool:
        """No: the rows count as test documents."""
        return False

    def has_test_docs(self) -> bool:
        """Yes: the rows."""
        return True

    def test_docs(self) -> list[dict[str, str]]:
        """One document a row: its id, prompt text and true answer."""
        pairs = zip(self.asked.rows, self.asked.prompts, strict=True)
        return [{"id": row.id, "prompt": prompt, "answer": row.answer} for row, prompt in pairs]

    def doc_to_text(self, doc: dict[str, str]) -> str:
        """The prompt as the chat template gives it."""
        return doc["prompt"]

    def doc_to_target(self, doc: dict[str, str]) -> str:
        """The true answer."""
        return doc["answer"]

    def fewshot_context(self, doc: dict[str, str], *_: Any, **__: Any) -> str:
        """The prompt, which holds the worked examples already."""
        return doc["prompt"]

    def construct_requests(self, doc: dict[str, str], ctx: str, **more: Any) -> Instance:
        """One greedy generation."""
        return Instance("generate_until", doc, (ctx, dict(self.generation)), 0, metadata=more["metadata"])

    def process_results(self, doc: dict[str, str], results: list[str]) -> dict[str, float]:
        """Exact match of the answer, and whether it is JSON where all true ones are."""
        found = {"exact_match": float(same(results[0], doc["answer"], self.as_json))}
        return found | ({"valid_json": float(parsed(results[0]) is not None)} if self.as_json else {})

    def aggregation(self) -> dict[str, Any]:
        """Means over the rows."""
        return dict.fromkeys(("exact_match", "valid_json"), mean)

    def higher_is_better(self) -> dict[str, bool]:
        """Both are."""
        return dict.fromkeys(("exact_match", "valid_json"), True)
