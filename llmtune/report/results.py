"""The report's results part: the key numbers, base against tuned, test rows side by side, and what to type next."""

from typing import Any

from llmtune.evaluate.metrics import format_score
from llmtune.evaluate.results import FEW_SHOT, TITLES
from llmtune.evaluate.results import table as result_table
from llmtune.files import read_json
from llmtune.numbers import count, duration, size
from llmtune.plan.table import PlanTable
from llmtune.recipe.sections import Recipe
from llmtune.recipe.suite import HELD_OUT
from llmtune.report.html import Html, section, table, tag
from llmtune.run import Run
from llmtune.run_log import Record

CASES = 10

Evaluation = dict[str, Any]


def evaluation(run: Run) -> Evaluation | None:
    """What eval/ holds of base and tuned model, None where the run is not evaluated."""
    return {name: read_json(run.eval / f"{name}.json") for name in ("base", "tuned")} if run.done("eval") else None


def tiles(found: Evaluation | None, plan: PlanTable | None, log: list[Record]) -> Html:
    """The numbers that a reader asks for first."""
    steps = [record for record in log if "loss" in record]
    last: Record = steps[-1] if steps else {}
    checks = [record["eval_loss"] for record in log if "eval_loss" in record]
    seconds = last.get("seconds")
    memory = max((record.get("peak_memory_mb") or 0.0 for record in steps), default=0.0)
    pairs = [*_scores(found)]
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


def _scores(found: Evaluation | None) -> list[tuple[str, str]]:
    """Exact match of the tuned model beside the better of the base's."""
    if found is None or HELD_OUT not in found["tuned"]["results"]:
        return []
    scores = {
        key: one["metrics"]["exact_match"]["value"]
        for key, one in found["base"]["results"].items()
        if key in (HELD_OUT, FEW_SHOT)
    }
    best = max(scores, key=lambda key: scores[key])
    name = "zero-shot" if best == HELD_OUT else f"{found['base']['results'][FEW_SHOT]['shots']}-shot"
    tuned = found["tuned"]["results"][HELD_OUT]["metrics"]["exact_match"]["value"]
    return [(f"{tuned:.3f}", f"exact match; base, {name}: {scores[best]:.3f}")]


def results_section(run: Run, settings: Recipe, found: Evaluation | None) -> Html:
    """Base and tuned model on the same rows, each number with its standard error, and the paired differences."""
    if found is None:
        asked = settings.eval.suite != "none"
        return section("Base and tuned", note="Not evaluated yet." if asked else "The recipe asks for no evaluation.")
    rows = result_table(run)
    head: list[object] = list(rows[0])
    body: list[list[object]] = [
        [tag("b", cell) if row["model"] == "tuned" else cell for cell in row.values()] for row in rows
    ]
    note = f"Greedy answers under the same settings; suite {settings.eval.suite}. ± is one standard error."
    warnings = [tag("p", line, class_="warn") for line in _warnings(found)]
    return section(
        "Base and tuned",
        table(head, body, set(range(1, len(head)))),
        *warnings,
        _differences(found),
        _how(found),
        note=note,
    )


def _warnings(found: Evaluation) -> list[str]:
    cut = [
        f"{name}, {task}: {one['truncated']} requests were longer than the model's context and lost their start."
        for name in ("base", "tuned")
        for task, one in found[name]["results"].items()
        if one.get("truncated")
    ]
    limited = any(one["n"] != one["of"] for one in found["tuned"]["results"].values())
    return [*cut, "Not all rows were asked: n says how many."] if limited else cut


def _differences(found: Evaluation) -> Html | None:
    """Tuned minus base on the same rows, by measure; for 0/1 measures also the rows won and lost."""
    rows: list[list[object]] = [
        [other, ("" if task == HELD_OUT else f"{task}: ") + TITLES.get(metric, metric), *_difference(one)]
        for other, tasks in (found["tuned"].get("differences") or {}).items()
        for task, metrics in tasks.items()
        for metric, one in metrics.items()
    ]
    head: list[object] = ["tuned minus", "measure", "difference", "rows won", "rows lost", "p"]
    return table(head, rows, {2, 3, 4, 5}) if rows else None


def _difference(one: dict[str, Any]) -> list[object]:
    gap = format_score({"value": one["difference"], "stderr": one["stderr"]})
    sign = "" if gap.startswith("-") else "+"
    return [sign + gap, one.get("won"), one.get("lost"), f"{one['p']:.2g}" if "p" in one else None]


def _how(found: Evaluation) -> Html:
    settings = found["tuned"]["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in settings.get("versions", {}).items())
    held = settings.get("held_out") or {}
    few = f", {held['shots']} worked examples as {held['shots_as']} for few-shot" if held.get("shots") else ""
    told = f"Computed in {settings['dtype']} on {settings['device']}{few}; {versions}. All of it: eval/settings.json."
    return tag("p", told, class_="note")


def cases_section(found: Evaluation | None) -> Html | None:
    """Ten held-out rows, evenly spaced: the question, the true answer, and what base and tuned model said."""
    if found is None or not found["tuned"].get("rows"):
        return None
    shots = found["base"]["results"].get(FEW_SHOT, {}).get("shots")
    columns = [("base, zero-shot", found["base"]["rows"]), (f"base, {shots}-shot", found["base"].get("few_shot_rows"))]
    answers = [(name, rows) for name, rows in [*columns, ("tuned", found["tuned"]["rows"])] if rows]
    total = len(found["tuned"]["rows"])
    chosen = sorted({round(index * (total - 1) / max(1, CASES - 1)) for index in range(min(CASES, total))})
    cases = [_case(found["tuned"]["rows"][place], [(name, rows[place]) for name, rows in answers]) for place in chosen]
    return section(f"{len(chosen)} held-out rows", *cases, note=f"Evenly spaced among {total:,}, not picked.")


def _case(row: dict[str, Any], answers: list[tuple[str, dict[str, Any]]]) -> Html:
    cells = [
        _answer("true answer", row["answer"], None),
        *(_answer(name, one["output"], one["exact_match"]) for name, one in answers),
    ]
    head = tag("header", tag("small", row["id"], class_="id"), tag("div", row["question"], class_="text"))
    return tag("div", head, tag("div", *cells, class_=f"cells of{len(cells)}"), class_="case")


def _answer(name: str, text: str, right: bool | None) -> Html:
    marks = {True: tag("span", "✓ right", class_="right"), False: tag("span", "✗ wrong", class_="wrong"), None: None}
    return tag(
        "div", tag("h3", tag("span", name), marks[right]), tag("div", text or tag("i", "nothing"), class_="text")
    )


def next_section(run: Run, settings: Recipe) -> Html:
    """The commands that come next: those of steps that are not done, then talking to the result and loading it."""
    trained, merged = run.done("train"), run.done("merge")
    steps = [
        (not trained, f"llmtune run {run.path}", "train, and everything after it"),
        (trained and not run.done("eval"), f"llmtune eval {run.path}", "compare base and tuned on held-out rows"),
        (trained and not merged, f"llmtune merge {run.path}", "full weights that stock transformers loads"),
        (trained and settings.publish is not None and not run.done("publish"), f"llmtune publish {run.path}", "upload"),
        (trained, f"llmtune chat {run.path}", "talk to base and tuned side by side"),
    ]
    width = max(len(command) for due, command, _ in steps if due)
    lines = [f"{command:<{width}}  # {why}" for due, command, why in steps if due]
    load = f'\n>>> from transformers import pipeline\n>>> pipeline("text-generation", "{run.merged}")'
    return section("Next", tag("pre", tag("code", "\n".join(lines), load if merged else None)))
