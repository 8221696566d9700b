"""Several runs on one page: results on the same rows, losses on one axis, cost, plans, and settings that differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune import __version__
from llmtune.arms.scores import Sample, gap, judge, mean, sample
from llmtune.arms.sentences import change_words
from llmtune.errors import LlmtuneError
from llmtune.evaluation.metrics import format_score
from llmtune.evaluation.tables import TITLES
from llmtune.files import write_text
from llmtune.numbers import duration, number, size
from llmtune.plan.table import PlanTable
from llmtune.recipe.compare import flatten
from llmtune.recipe.suite import HELD_OUT
from llmtune.reporting.charts.axes import STEPS
from llmtune.reporting.charts.dots import Dot
from llmtune.reporting.comparison.charts import against, colors, losses
from llmtune.reporting.comparison.sections import SECONDS
from llmtune.reporting.document import document
from llmtune.reporting.history import History, read_history
from llmtune.reporting.html import Html, fold, section, table, tag
from llmtune.reporting.layers import strip
from llmtune.reporting.values import JSON, mapping, mappings, read_object, text
from llmtune.reporting.values import number as finite
from llmtune.run import Run
from llmtune.run_log import read_log


@dataclass(frozen=True)
class _Side:
    """One run: its name on the page, and what it holds so far."""

    name: str
    run: Run
    settings: dict[str, Any]
    base: str
    history: History
    plan: PlanTable | None
    questions: list[str]
    scores: dict[str, Sample]
    """Of the held-out rows, by metric; none where the run is not evaluated."""


def write_runs(runs: Sequence[Run], page: Path) -> Path:
    """Write the page of several runs and return its path; what a run has not done yet is a line."""
    write_text(page, render_runs(runs))
    return page


def render_runs(runs: Sequence[Run]) -> str:
    """Return the page of several runs, side by side in their order."""
    sides = [_side(run, name) for run, name in zip(runs, _names(runs), strict=True)]
    palette = colors([side.name for side in sides])
    body: list[Html | None] = [
        tag("h1", "Runs side by side", dir="auto"),
        tag("p", ", ".join(side.name for side in sides), class_="lede"),
        _results(sides, palette),
        _losses(sides, palette),
        _settings(sides),
        *_plans(sides),
        tag("footer", f"Written by llmtune {__version__}. This page is one file and loads nothing."),
    ]
    return document("Runs side by side", body)


def _names(runs: Sequence[Run]) -> list[str]:
    """Name runs by their folders, with as many folders above as tell them apart."""
    paths = [run.path.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({place})" for place, name in enumerate(names, 1)]


def _side(run: Run, name: str) -> _Side:
    recipe = run.recipe()
    stored = read_object(run.eval / "tuned.json") if run.done("eval") else {}
    rows = mappings(stored.get("rows"))
    try:
        plan = PlanTable.read(run.plan_file)
    except LlmtuneError:
        plan = None
    base = plan.base.hub_id or plan.base.name if plan else recipe.model.base
    questions = [f"{one.get('question')}\n{one.get('answer')}" for one in rows]
    history = read_history(read_log(run.log_file))
    return _Side(name, run, recipe.model_dump(mode="json"), base, history, plan, questions, _samples(stored, len(rows)))


def _samples(stored: JSON, rows: int) -> dict[str, Sample]:
    result = mapping(mapping(stored.get("results")).get(HELD_OUT))
    tokens = result.get("tokens")
    samples = {}
    for metric, values in mapping(result.get("scores")).items():
        weights = tokens if metric == "loss" and isinstance(tokens, list) and len(tokens) == rows else None
        if isinstance(values, list) and len(values) == rows > 0:
            samples[metric] = sample([[finite(value) for value in values]], weights)
    return samples


def _results(sides: Sequence[_Side], palette: dict[str, str]) -> Html:
    """Show scores and costs of each run, and how each differs from the first on the same rows."""
    metrics = [name for name in TITLES if any(name in side.scores for side in sides)]
    head: list[object] = ["run", *(TITLES[name] for name in metrics)]
    cells: list[list[object]] = [[side.name, *_scores(side, metrics)] for side in sides]
    scores = [table(head, cells, set(range(1, len(head))))] if metrics else []
    notes = [tag("p", note, class_="note") for note in _notes(sides)]
    pairs = _differences(sides, metrics)
    differ: list[object] = ["run", "metric", "difference", "verdict", "rows"]
    gaps = [tag("h3", f"Minus {sides[0].name}, on the same rows"), table(differ, pairs, {2, 4})] if pairs else []
    costs: list[list[object]] = [[side.name, side.base, *_costs(side)] for side in sides]
    took = table(["run", "base", "training", "peak memory", "delta"], costs, {2, 3, 4}, {1})
    drawn = [tag("h3", "What each took"), took, _cost(sides, metrics, palette)]
    return section("Results", *scores, *notes, *gaps, *drawn, note="± is one standard error." if metrics else None)


def _scores(side: _Side, metrics: Sequence[str]) -> list[object]:
    known = {name: mean(one, None) for name, one in side.scores.items()}
    return [format_score(known[name]["value"], known[name]["stderr"]) if name in known else None for name in metrics]


def _costs(side: _Side) -> list[object]:
    seconds, peak = side.history.seconds, side.history.peak_memory_mb
    delta = sum(file.stat().st_size for file in side.run.delta.rglob("*") if file.is_file())
    return [
        None if seconds is None else duration(seconds),
        None if peak is None else size(peak * 2**20),
        size(delta) if delta else None,
    ]


def _notes(sides: Sequence[_Side]) -> list[str]:
    """Say what keeps runs from being compared."""
    notes = [f"{side.name} is not evaluated: llmtune eval {side.run.path}" for side in sides if not side.scores]
    if len({side.base for side in sides}) > 1:
        notes.append("The runs have different bases; losses of different tokenizers cannot be compared.")
    first = next((side for side in sides if side.scores), None)
    other = [side.name for side in sides if first and side.scores and side.questions != first.questions]
    if first and other:
        notes.append(f"{', '.join(other)}: other held-out rows than {first.name}; no difference is paired.")
    return notes


def _differences(sides: Sequence[_Side], metrics: Sequence[str]) -> list[list[object]]:
    """Rows of each later run minus the first, metric by metric, where both answered the same questions."""
    first = sides[0]
    rows: list[list[object]] = []
    for metric in metrics:
        others = [
            side
            for side in sides[1:]
            if metric in side.scores and metric in first.scores and side.questions == first.questions
            if metric != "loss" or side.base == first.base
        ]
        gaps = [gap(side.scores[metric], first.scores[metric], None) for side in others]
        judge(gaps, higher_is_better=metric not in ("loss", "perplexity"))
        for side, one in zip(others, gaps, strict=True):
            rows.append([side.name, TITLES[metric], change_words(one), one.get("verdict"), one["n"]])
    return rows


def _cost(sides: Sequence[_Side], metrics: Sequence[str], palette: dict[str, str]) -> Html | None:
    """Draw exact match, or else the first metric, against the minutes of training."""
    dots = []
    metric = next((name for name in ("exact_match", *metrics) if name in metrics), "")
    for side in sides:
        if metric in side.scores and side.history.seconds:
            score = mean(side.scores[metric], None)
            if score["value"] is not None:
                minutes = side.history.seconds / 60
                dots.append(Dot(side.name, minutes, score["value"], score["stderr"], color=palette[side.name]))
    return against(dots, "minutes of training", TITLES[metric]) if dots else None


def _losses(sides: Sequence[_Side], palette: dict[str, str]) -> Html:
    by_seconds = losses([(side.name, _timed(side.history)) for side in sides], SECONDS, palette)
    by_steps = losses([(side.name, side.history.validation_losses) for side in sides], STEPS, palette)
    if by_steps is None:
        return section("Validation loss", note="No run has a validation in its log yet.")
    missing = [side.name for side in sides if not side.history.validation_losses]
    note = f"Without a validation: {', '.join(missing)}." if missing else None
    return section(
        "Validation loss", by_seconds or by_steps, fold("By steps", by_steps) if by_seconds else None, note=note
    )


def _timed(history: History) -> list[tuple[float, float]]:
    """Validation losses by the seconds of the step before which they stand."""
    seconds = {
        record["step"]: value for record in history.steps if (value := finite(record.get("seconds"))) is not None
    }
    return [(seconds[step], loss) for step, loss in history.validation_losses if step in seconds]


def _settings(sides: Sequence[_Side]) -> Html:
    """List the settings whose values differ."""
    flat = [dict(flatten(side.settings)) for side in sides]
    keys = [
        key
        for key in dict.fromkeys(key for one in flat for key in one)
        if len({repr(one.get(key)) for one in flat}) > 1
    ]
    rows: list[list[object]] = [[tag("code", key), *(_value(one.get(key)) for one in flat)] for key in keys]
    if not rows:
        return section("Settings that differ", note="None: the recipes are the same.")
    return section(
        "Settings that differ", table(["setting", *(side.name for side in sides)], rows, words=range(1, len(sides) + 1))
    )


def _value(value: object) -> str:
    return text(value) or number(value)


def _plans(sides: Sequence[_Side]) -> list[Html | None]:
    parts = [part for side in sides if side.plan for part in (tag("h3", side.name), strip(side.plan, side.name))]
    note = "The highest rate that each stage has at each distance from the output."
    return [section("What trains when", *parts, note=note) if parts else None]
