"""The report's chart of held-out scores: base and tuned model by metric, each with its error."""

from llmtune.evaluation.metrics import Score
from llmtune.evaluation.results import FEW_SHOT, Result
from llmtune.evaluation.tables import TITLES
from llmtune.recipe.suite import HELD_OUT
from llmtune.reporting.charts.axes import Axis
from llmtune.reporting.charts.dots import Interval, intervals
from llmtune.reporting.charts.lines import legend
from llmtune.reporting.evaluations import Evaluations
from llmtune.reporting.html import Html, join

COLORS = ("var(--base)", "var(--valid)", "var(--tuned)")


def scores_chart(evaluations: Evaluations) -> Html | None:
    """Draw the metrics of held-out rows that lie between 0 and 1; None where there are none.

    A line is a score's 95% interval, or two standard errors on either side where no interval is stored.
    """
    models = {
        "base, zero-shot": evaluations.base.get(HELD_OUT),
        evaluations.few_shot_name: evaluations.base.get(FEW_SHOT),
        "tuned": evaluations.tuned.get(HELD_OUT),
    }
    known = [(name, color, result) for (name, result), color in zip(models.items(), COLORS, strict=True) if result]
    values = [
        Interval(title, name, value, *_bounds(score, value), color)
        for metric, title in TITLES.items()
        for name, color, result in known
        if (score := _score(result, metric)) and (value := score["value"]) is not None
    ]
    if not values:
        return None
    words = "; ".join(f"{one.category}, {one.kind} {one.value:.3f}" for one in values)
    keys = legend([(color, name) for name, color, _ in known])
    return join(keys, intervals(values, f"Scores on held-out rows: {words}", Axis("score", domain=(-0.01, 1.01))))


def _score(result: Result, metric: str) -> Score | None:
    """A score that more is better of, between 0 and 1."""
    score = result["metrics"].get(metric)
    value = score and score["value"]
    shown = result["higher_is_better"].get(metric, metric not in ("loss", "perplexity", "chrf"))
    return score if shown and value is not None and 0 <= value <= 1 else None


def _bounds(score: Score, value: float) -> tuple[float, float]:
    error = 2 * (score["stderr"] or 0.0)
    return score.get("interval") or (max(0.0, value - error), min(1.0, value + error))
