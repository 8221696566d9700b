"""The run's own held-out rows as an lm-eval task: zero-shot, or few-shot with worked examples as earlier turns."""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig

from llmtune.evaluation.held_out.answers import scorer
from llmtune.evaluation.held_out.choice import EXACT_MATCH
from llmtune.evaluation.held_out.truth import comparison, kinds_of
from llmtune.evaluation.questions import Questions


class HeldOut(Task):
    """Greedy answers, scored by names of eval.metrics; exact match compares text, parsed JSON or tool calls."""

    VERSION = 1
    OUTPUT_TYPE = "generate_until"

    def __init__(
        self,
        name: str,
        questions: Questions,
        stop: set[int],
        new_tokens: int,
        metrics: Sequence[str] = (EXACT_MATCH,),
    ) -> None:
        self.questions = questions
        self.scorers = [one for one in map(scorer, metrics) if one is not None]
        kinds = kinds_of(questions.truths)
        self.kinds = dict(zip((row.where for row in questions.rows), kinds, strict=True))
        self.truths = dict(zip(self.kinds, questions.truths, strict=True))
        self.comparison = comparison(questions.truths)
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
        """Return one document a row: its place, prompt text and true answer."""
        asked = zip(self.questions.rows, self.questions.prompts, self.questions.truths, strict=True)
        return [{"where": row.where, "prompt": prompt, "answer": truth.text} for row, prompt, truth in asked]

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

    def process_results(self, doc: dict[str, str], results: list[str]) -> dict[str, Any]:
        """Score an answer by each metric."""
        truth, kind = self.truths[doc["where"]], self.kinds[doc["where"]]
        answer = truth.compared(results[0])
        return {name: item for one in self.scorers for name, item in one.score(answer, truth, kind).items()}

    def aggregation(self) -> dict[str, Any]:
        """Return how the scores of rows become the number of each metric."""
        return {name: one for scorer in self.scorers for name, one in scorer.aggregations.items()}

    def higher_is_better(self) -> dict[str, bool]:
        """Return True for each metric."""
        return dict.fromkeys(self.aggregation(), True)
