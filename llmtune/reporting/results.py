"""The report on results: base against tuned with standard errors, paired differences, and how they were computed."""

from llmtune.evaluation.forgetting.words import forgetting_notes
from llmtune.evaluation.metrics import Difference, format_difference, format_interval
from llmtune.evaluation.results import FEW_SHOT, TEXTS_COMPARED
from llmtune.evaluation.tables import TITLES, compare_models, compare_tasks, is_shown, task_title
from llmtune.recipe.sections import Recipe
from llmtune.recipe.suite import HELD_OUT
from llmtune.reporting.evaluations import Evaluations, Results
from llmtune.reporting.html import Html, section, table, tag
from llmtune.reporting.scores import scores_chart
from llmtune.reporting.values import mapping, text, whole


def best_exact_match(evaluations: Evaluations | None) -> tuple[float, str, float] | None:
    """Return the exact match of the tuned model, and name and exact match of the better base; None without them."""
    if evaluations is None:
        return None
    scores = {
        name: results[task]["metrics"]["exact_match"]["value"]
        for name, results, task in (
            ("tuned", evaluations.tuned, HELD_OUT),
            ("base, zero-shot", evaluations.base, HELD_OUT),
            (evaluations.few_shot_name, evaluations.base, FEW_SHOT),
        )
        if task in results and "exact_match" in results[task]["metrics"]
    }
    finite = {name: value for name, value in scores.items() if value is not None}
    tuned = finite.pop("tuned", None)
    if tuned is None or not finite:
        return None
    best = max(finite, key=lambda name: finite[name])
    return tuned, best, finite[best]


def best_perplexity(evaluations: Evaluations | None) -> tuple[float, float] | None:
    """Return the perplexity of tuned and base on held-out texts; None where questions were asked, or without them."""
    if evaluations is None or best_exact_match(evaluations) is not None:
        return None
    tuned, base = (_perplexity(results) for results in (evaluations.tuned, evaluations.base))
    return None if tuned is None or base is None else (tuned, base)


def _perplexity(results: Results) -> float | None:
    result = results.get(HELD_OUT)
    if result is None or result.get("compared") != TEXTS_COMPARED or "perplexity" not in result["metrics"]:
        return None
    return result["metrics"]["perplexity"]["value"]


def results_section(settings: Recipe, evaluations: Evaluations | None) -> Html:
    """Compare base and tuned model on the same rows: scores with standard errors, and paired differences."""
    if evaluations is None:
        skipped = settings.eval.suite == "none"
        note = "eval.suite is none: this run is not evaluated." if skipped else "Not evaluated yet."
        return section("Base and tuned", note=note)
    if evaluations.refusal:
        refused = f"{evaluations.refusal[0].upper()}{evaluations.refusal[1:]}."
        return section("Base and tuned", note=refused)
    if not (evaluations.tuned and (evaluations.base or evaluations.unasked)):
        return section("Base and tuned", note="The stored evaluation holds no scores that this version can read.")
    models = (evaluations.base, evaluations.tuned)
    tables = [_scores(rows) for rows in (compare_models(*models, with_intervals=True), compare_tasks(*models)) if rows]
    gaps = evaluations.differences.get("base, zero-shot", {})
    asked = "Loss and perplexity by token" if best_perplexity(evaluations) else "Greedy answers"
    note = (
        f"{asked} under the same settings; suite {settings.eval.suite}. ± is one standard error, [ ] the 95% interval."
    )
    warnings = [tag("p", line, class_="warn") for line in _warnings(evaluations)]
    return section(
        "Base and tuned",
        scores_chart(evaluations),
        *tables,
        *warnings,
        _differences(evaluations),
        *[tag("p", f"{line[0].upper()}{line[1:]}.") for line in forgetting_notes(*models, gaps)],
        _how(evaluations),
        note=note,
    )


def _scores(rows: list[dict[str, str]]) -> Html:
    """Show rows of cells by column title; the tuned model's are bold."""
    titles = list(dict.fromkeys(title for row in sorted(rows, key=len, reverse=True) for title in row))
    body: list[list[object]] = [
        [_score(row[title], row.get("model") == "tuned") if title in row else None for title in titles] for row in rows
    ]
    return table([*titles], body, set(range(1, len(titles))))


def _score(cell: str, bold: bool = False) -> Html:
    """A score or a difference, its interval on a line of its own: in one line, three metrics are wider than a page."""
    value, bracket, bounds = cell.partition("[")
    interval = tag("small", f"[{bounds}", class_="interval") if bracket else None
    return tag("b" if bold else "span", value, interval)


def _warnings(evaluations: Evaluations) -> list[str]:
    results = [
        (f"{name}, {task_title(task, result)}", result)
        for name, by_task in (("base", evaluations.base), ("tuned", evaluations.tuned))
        for task, result in by_task.items()
    ]
    unasked = [f"The base was not asked: {evaluations.unasked}."] if evaluations.unasked else []
    cut = [
        f"{name}: {result['truncated']} requests were longer than the model's context and lost their start."
        for name, result in results
        if result["truncated"]
    ]
    broken = [
        f"{name}: the log-likelihood of {result['not_finite']} requests was not finite."
        for name, result in results
        if result["not_finite"]
    ]
    limited = any(result["n"] != result["of"] for result in evaluations.tuned.values())
    return [*unasked, *cut, *broken, *["Not all rows were used: n says how many."] * limited]


def _differences(evaluations: Evaluations) -> Html | None:
    """Show tuned minus base on the same rows, by metric, in words too; for 0/1 metrics the rows won and lost."""
    rows: list[list[object]] = [
        [
            evaluations.few_shot_name if other == "base, few-shot" else other,
            _metric(evaluations, task, metric),
            *_difference(gap),
        ]
        for other, tasks in evaluations.differences.items()
        for task, metrics in tasks.items()
        if task not in evaluations.tuned or is_shown(task, evaluations.tuned[task])
        for metric, gap in metrics.items()
    ]
    head: list[object] = ["tuned minus", "metric", "difference", "which is", "won", "lost", "p (McNemar)"]
    return table(head, rows, {2, 4, 5, 6}) if rows else None


def _metric(evaluations: Evaluations, task: str, metric: str) -> str:
    """Name a metric with its task, and with its direction where lower is better."""
    name = TITLES.get(metric, metric) if task == HELD_OUT else f"{task}: {metric}"
    result = evaluations.tuned.get(task)
    return f"{name} (lower is better)" if result and result["higher_is_better"].get(metric) is False else name


def _difference(gap: Difference) -> list[object]:
    p = f"{gap['p']:.2g}" if "p" in gap else None
    bounds = format_interval(gap.get("interval"), "+")
    cell = f"{format_difference(gap)} [{bounds}]" if bounds else format_difference(gap)
    return [_score(cell), gap.get("verdict"), gap.get("won"), gap.get("lost"), p]


def _how(evaluations: Evaluations) -> Html | None:
    """Say in which precision, where and with which versions the scores were computed, as far as is known."""
    settings, held_out = evaluations.settings, mapping(evaluations.settings.get("held_out"))
    precision, device, way = (
        text(one) for one in (settings.get("dtype"), settings.get("device"), held_out.get("shots_as"))
    )
    place = [f"in {precision}"] * bool(precision) + [f"on {device}"] * bool(device)
    quantize = text(settings.get("quantize")) or "none"
    base = [f"over the {quantize.replace('bit', '-bit')} base that was trained"] * (quantize != "none")
    parts = [f"Computed {' '.join(place + base)}."] if place else []
    shots = whole(held_out.get("shots"))
    if shots:
        parts.append(f"The few-shot base saw {shots} worked example{'s' * (shots > 1)}{f' as {way}' if way else ''}.")
    compared = {text(mapping(one).get("compared")) for one in evaluations.tuned.values()} - {None, "text"}
    parts += [f"Compared: {words}." for words in sorted(map(str, compared))]
    versions = ", ".join(f"{name} {one}" for name, one in mapping(settings.get("versions")).items() if text(one))
    parts += [f"Versions: {versions}."] if versions else []
    return tag("p", " ".join(parts), class_="note") if parts else None
