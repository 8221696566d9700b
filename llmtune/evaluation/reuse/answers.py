"""A base's answers to the parts of an exam: those that were kept, and those that are given now."""

from typing import Any

from llmtune.evaluation.boundary import failures_named
from llmtune.evaluation.exam import Exam
from llmtune.evaluation.results import Answer, Result
from llmtune.evaluation.reuse.facts import part_facts
from llmtune.evaluation.reuse.store import keep, recall
from llmtune.machine.processes import gather, rank

Part = tuple[dict[str, Result], list[Answer]]
"""The results of a part of an exam by task, and the answers to its held-out rows."""


class BaseAnswers:
    """Answers of one base, in one form on one device; several processes read what the first one finds."""

    def __init__(self, exam: Exam, model: dict[str, Any]) -> None:
        self._exam, self._model = exam, model
        self._facts: dict[str, dict[str, Any]] = {}
        self.asked: dict[str, float] = {}
        """Seconds that each part took that was asked now."""
        self.reused: dict[str, float] = {}
        """Seconds that each part took when it was asked, of those that were kept."""

    def recall(self, part: str) -> tuple[Part, str] | None:
        """Return a part's answers and the time at which they were given; None where it is to be asked."""
        with failures_named(f"base, {part}", "leave this task out of the suite"):
            # lm-eval changes a task's settings when it is asked.
            self._facts[part] = {"model": self._model, "asked": part_facts(self._exam, part)}
        kept = gather(recall(self._facts[part]) if rank() == 0 else None)[0]
        if kept is None:
            return None
        self.reused[part] = kept.seconds
        results, answers = kept.answers
        return ({task: _as_given(result) for task, result in results.items()}, answers), kept.given

    def keep(self, part: str, answers: Part, seconds: float) -> None:
        """Keep what was answered to a part that was not recalled, and took so long."""
        self.asked[part] = seconds
        if rank() == 0:
            keep(self._facts[part], list(answers), seconds)

    def seconds(self) -> dict[str, dict[str, float]]:
        """Return what each part took, of those that were asked and of those that were not asked again."""
        return {"asked": self.asked, "reused": self.reused}


def _as_given(result: Result) -> Result:
    """Return a result from JSON with its intervals as they were, pairs."""
    metrics: dict[str, Any] = {
        name: {**score, "interval": tuple(score["interval"])} if "interval" in score else score
        for name, score in result["metrics"].items()
    }
    return {**result, "metrics": metrics}
