"""What eval/ holds, read so that a value that is absent or not finite costs only itself."""

from dataclasses import dataclass
from typing import cast

from llmtune.errors import ProofError
from llmtune.evaluation.metrics import Difference, Score
from llmtune.evaluation.results import FEW_SHOT, Differences, Result, require_same_settings
from llmtune.recipe.suite import HELD_OUT
from llmtune.reporting.values import JSON, mapping, mappings, number, read_object, text, whole
from llmtune.run import Run

Results = dict[str, Result]
"""By task."""


@dataclass(frozen=True)
class Evaluations:
    """Scores of base and tuned model by task, their differences, and the answers to the held-out rows."""

    base: Results
    tuned: Results
    differences: dict[str, Differences]
    settings: JSON
    base_rows: list[JSON]
    few_shot_rows: list[JSON]
    tuned_rows: list[JSON]
    refusal: str = ""
    """Why the stored results are not compared; "" where they are."""
    unasked: str = ""
    """Why the base was not asked; "" where it was."""

    @property
    def few_shot_name(self) -> str:
        """The few-shot base in words: base, 5-shot."""
        return f"base, {self.base[FEW_SHOT]['shots']}-shot" if FEW_SHOT in self.base else "base, few-shot"


def read_evaluations(run: Run) -> Evaluations | None:
    """Read what eval/ holds; None if the run is not evaluated."""
    if not run.done("eval"):
        return None
    base, tuned = (read_object(run.eval / f"{name}.json") for name in ("base", "tuned"))
    try:
        require_same_settings(tuned.get("settings"), base.get("settings"))
    except ProofError as error:
        return Evaluations({}, {}, {}, {}, [], [], [], str(error))
    of_base, of_tuned = _results(base), _results(tuned)
    unasked = text(base.get("unasked")) or ""
    if not unasked and (HELD_OUT not in of_base or HELD_OUT not in of_tuned):
        for results in (of_base, of_tuned):
            results.pop(HELD_OUT, None)
            results.pop(FEW_SHOT, None)
    gaps = {other: _differences(mapping(tasks)) for other, tasks in mapping(tuned.get("differences")).items()}
    rows = (mappings(base.get("rows")), mappings(base.get("few_shot_rows")), mappings(tuned.get("rows")))
    return Evaluations(of_base, of_tuned, gaps, mapping(tuned.get("settings")), *rows, unasked=unasked)


def _results(stored: JSON) -> Results:
    results = {task: _result(mapping(fields)) for task, fields in mapping(stored.get("results")).items()}
    return {task: result for task, result in results.items() if result["metrics"]}


def _result(fields: JSON) -> Result:
    metrics = {name: _score(mapping(one)) for name, one in mapping(fields.get("metrics")).items()}
    rows = whole(fields.get("n")) or max((one["n"] for one in metrics.values()), default=0)
    of = whole(fields.get("of"))
    counts = {key: whole(fields.get(key)) or 0 for key in ("shots", "truncated", "not_finite")}
    better = {name: one for name, one in mapping(fields.get("higher_is_better")).items() if isinstance(one, bool)}
    known = {"n": rows, "of": rows if of is None else of, "metrics": metrics, "higher_is_better": better}
    known |= {"compared": text(fields.get("compared"))}
    known |= {"group": group} if (group := text(fields.get("group"))) else {}
    return cast(Result, counts | known)


def _score(fields: JSON) -> Score:
    value, error = number(fields.get("value")), number(fields.get("stderr"))
    score: Score = {"value": value, "stderr": error, "n": whole(fields.get("n")) or 0}
    bounds = _interval(fields)
    return {**score, "interval": bounds} if bounds else score


def _interval(fields: JSON) -> tuple[float, float] | None:
    """Return the two bounds of an interval, where both are numbers."""
    bounds = fields.get("interval")
    low, high = (number(bound) for bound in bounds) if isinstance(bounds, list) and len(bounds) == 2 else (None, None)
    return None if low is None or high is None else (low, high)


def _differences(tasks: JSON) -> Differences:
    return {
        task: {
            metric: _difference(mapping(gap)) for metric, gap in mapping(gaps).items() if "difference" in mapping(gap)
        }
        for task, gaps in tasks.items()
    }


def _difference(fields: JSON) -> Difference:
    value, error = number(fields.get("difference")), number(fields.get("stderr"))
    counts = {key: whole(fields.get(key)) for key in ("won", "lost")}
    more = {
        **counts,
        "interval": _interval(fields),
        "p": number(fields.get("p")),
        "verdict": text(fields.get("verdict")),
    }
    gap = {"difference": value, "stderr": error, "n": whole(fields.get("n")) or 0}
    return cast(Difference, gap | {key: one for key, one in more.items() if one is not None})
