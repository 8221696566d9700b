"""The report on results: key numbers, base against tuned, held-out rows side by side, the next commands."""

from typing import cast

from llmtune.evaluation.metrics import Difference, format_score
from llmtune.evaluation.results import FEW_SHOT, TITLES, Answer, Evaluations, task_title
from llmtune.evaluation.results import table as result_table
from llmtune.files import read_json
from llmtune.numbers import count, duration, size
from llmtune.plan.table import PlanTable
from llmtune.recipe.sections import Recipe
from llmtune.recipe.suite import HELD_OUT
from llmtune.reporting.html import Html, section, table, tag
from llmtune.run import Run
from llmtune.run_log import Record

CASES = 10


def read_evaluations(run: Run) -> Evaluations | None:
    """Read what eval/ holds; None if the run is not evaluated."""
    if not run.done("eval"):
        return None
    return cast(Evaluations, {name: read_json(run.eval / f"{name}.json") for name in ("base", "tuned", "settings")})


def tiles(evaluations: Evaluations | None, plan: PlanTable | None, log: list[Record]) -> Html:
    """Show the key numbers of the run."""
    steps = [record for record in log if "loss" in record]
    last: Record = steps[-1] if steps else {}
    checks = [record["eval_loss"] for record in log if "eval_loss" in record]
    seconds = last.get("seconds")
    memory = max((record.get("peak_memory_mb") or 0.0 for record in steps), default=0.0)
    pairs = [*_scores(evaluations)]
    if checks:
        pairs.append(
            (f"{checks[-1]:.3f}", f"validation loss, first {checks[0]:.3f}" if len(checks) > 1 else "validation loss")
        )
    if seconds:
        pairs.append((duration(seconds), f"training, {last['tokens'] / seconds:,.0f} tokens/s"))
    if memory:
        pairs.append((size(memory * 2**20), "peak memory"))
    if plan:
        share = plan.trained / plan.parameters
        pairs.append((count(plan.trained), f"parameters trained, {share:.1%} of the model"))
    return tag("div", *(tag("div", tag("b", value), tag("span", label)) for value, label in pairs), class_="tiles")


def _scores(evaluations: Evaluations | None) -> list[tuple[str, str]]:
    """Return the exact match of the tuned model, and the better one of the base."""
    if evaluations is None or HELD_OUT not in evaluations["tuned"]["results"]:
        return []
    scores = {
        key: one["metrics"]["exact_match"]["value"]
        for key, one in evaluations["base"]["results"].items()
        if key in (HELD_OUT, FEW_SHOT)
    }
    best = max(scores, key=lambda key: scores[key] or 0.0)
    name = "zero-shot" if best == HELD_OUT else f"{evaluations['base']['results'][FEW_SHOT]['shots']}-shot"
    tuned = evaluations["tuned"]["results"][HELD_OUT]["metrics"]["exact_match"]["value"]
    return [(f"{tuned:.3f}", f"exact match; base, {name}: {scores[best]:.3f}")]


def results_section(run: Run, settings: Recipe, evaluations: Evaluations | None) -> Html:
    """Compare base and tuned model on the same rows: scores with standard errors, and paired differences."""
    if evaluations is None:
        skipped = settings.eval.suite == "none"
        note = "eval.suite is none: this run is not evaluated." if skipped else "Not evaluated yet."
        return section("Base and tuned", note=note)
    rows = result_table(run)
    head: list[object] = list(rows[0])
    body: list[list[object]] = [
        [tag("b", cell) if row["model"] == "tuned" else cell for cell in row.values()] for row in rows
    ]
    note = f"Greedy answers under the same settings; suite {settings.eval.suite}. ± is one standard error."
    warnings = [tag("p", line, class_="warn") for line in _warnings(evaluations)]
    return section(
        "Base and tuned",
        table(head, body, set(range(1, len(head)))),
        *warnings,
        _differences(evaluations),
        _how(evaluations),
        note=note,
    )


def _warnings(evaluations: Evaluations) -> list[str]:
    cut = [
        f"{name}, {task_title(task, result)}: {result['truncated']} requests were longer than the model's context "
        "and lost their start."
        for name, model in (("base", evaluations["base"]), ("tuned", evaluations["tuned"]))
        for task, result in model["results"].items()
        if result.get("truncated")
    ]
    limited = any(result["n"] != result["of"] for result in evaluations["tuned"]["results"].values())
    return [*cut, "Not all rows were used: n says how many."] if limited else cut


def _differences(evaluations: Evaluations) -> Html | None:
    """Show tuned minus base on the same rows, by metric; for 0/1 metrics also the rows won and lost."""
    rows: list[list[object]] = [
        [other, ("" if task == HELD_OUT else f"{task}: ") + TITLES.get(metric, metric), *_difference(gap)]
        for other, tasks in (evaluations["tuned"].get("differences") or {}).items()
        for task, metrics in tasks.items()
        for metric, gap in metrics.items()
    ]
    head: list[object] = ["tuned minus", "metric", "difference", "rows won", "rows lost", "p, McNemar's test"]
    return table(head, rows, {2, 3, 4, 5}) if rows else None


def _difference(gap: Difference) -> list[object]:
    text = format_score(gap["difference"], gap["stderr"])
    sign = "" if text.startswith("-") else "+"
    return [sign + text, gap.get("won"), gap.get("lost"), f"{gap['p']:.2g}" if "p" in gap else None]


def _how(evaluations: Evaluations) -> Html:
    settings = evaluations["tuned"]["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in settings.get("versions", {}).items())
    held_out = settings.get("held_out") or {}
    few = (
        f", {held_out['shots']} worked examples as {held_out['shots_as']} for few-shot" if held_out.get("shots") else ""
    )
    text = (
        f"Computed in {settings['dtype']} on {settings['device']}{few}; {versions}. All settings: eval/settings.json."
    )
    return tag("p", text, class_="note")


def cases_section(evaluations: Evaluations | None) -> Html | None:
    """Show ten held-out rows, evenly spaced: the question, the true answer, and those of base and tuned model."""
    if evaluations is None or not evaluations["tuned"].get("rows"):
        return None
    columns = [("base, zero-shot", evaluations["base"]["rows"])]
    if "few_shot_rows" in evaluations["base"]:
        shots = evaluations["base"]["results"][FEW_SHOT]["shots"]
        columns.append((f"base, {shots}-shot", evaluations["base"]["few_shot_rows"]))
    columns.append(("tuned", evaluations["tuned"]["rows"]))
    total = len(evaluations["tuned"]["rows"])
    chosen = sorted({round(index * (total - 1) / max(1, CASES - 1)) for index in range(min(CASES, total))})
    cases = [
        _case(evaluations["tuned"]["rows"][place], [(name, rows[place]) for name, rows in columns]) for place in chosen
    ]
    return section(f"{len(chosen)} held-out rows", *cases, note=f"Evenly spaced among all {total:,}, not selected.")


def _case(row: Answer, answers: list[tuple[str, Answer]]) -> Html:
    cells = [
        _answer("true answer", row["answer"], None),
        *(_answer(name, answer["output"], answer["exact_match"]) for name, answer in answers),
    ]
    head = tag("header", tag("small", row["id"], class_="id"), tag("div", row["question"], class_="text"))
    return tag("div", head, tag("div", *cells, class_=f"cells of{len(cells)}"), class_="case")


def _answer(name: str, text: str, right: bool | None) -> Html:
    marks = {True: tag("span", "✓ right", class_="right"), False: tag("span", "✗ wrong", class_="wrong"), None: None}
    return tag(
        "div", tag("h3", tag("span", name), marks[right]), tag("div", text or tag("i", "nothing"), class_="text")
    )


def next_section(run: Run, settings: Recipe) -> Html:
    """List the next commands: steps that are not done, then how to chat with the model and to load it."""
    trained, merged = run.done("train"), run.done("merge")
    steps = [
        (not trained, f"llmtune run {run.path}", "train, and everything after it"),
        (trained and not run.done("eval"), f"llmtune eval {run.path}", "compare base and tuned on held-out rows"),
        (trained and not merged, f"llmtune merge {run.path}", "full weights that stock transformers loads"),
        (trained and settings.publish is not None and not run.done("publish"), f"llmtune publish {run.path}", "upload"),
        (trained, f"llmtune chat {run.path}", "talk to base and tuned model side by side"),
    ]
    width = max(len(command) for due, command, _ in steps if due)
    lines = [f"{command:<{width}}  # {why}" for due, command, why in steps if due]
    load = f'\n>>> from transformers import pipeline\n>>> pipeline("text-generation", "{run.merged}")'
    return section("Next", tag("pre", tag("code", "\n".join(lines), load if merged else None)))
