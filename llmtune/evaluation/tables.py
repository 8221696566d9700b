"""Results as tables for people: a row for each model, and the differences in words."""

from collections.abc import Mapping

from llmtune.evaluation.forgetting.words import forgetting_notes
from llmtune.evaluation.metrics import Difference, format_difference, format_interval, format_score
from llmtune.evaluation.results import (
    FEW_SHOT,
    GENERAL_QUESTIONS,
    GENERAL_TEXTS,
    TEXTS,
    TEXTS_COMPARED,
    Evaluation,
    Result,
    read_evaluation,
)
from llmtune.files import read_json
from llmtune.recipe.suite import HELD_OUT
from llmtune.run import Run

TITLES = {
    "valid_json": "valid JSON",
    "field_f1": "field F1",
    "exact_match": "exact match",
    "label_accuracy": "label accuracy",
    "label_f1": "label F1",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "chrf": "chrF",
    "loss": "loss",
    "perplexity": "perplexity",
}
"""Metrics of held-out rows, in the order in which they are shown; patterns stand before the loss."""
_LAST = ("loss", "perplexity")
INTERVAL = "95% interval"

MOST_COLUMNS = 4
"""Tasks that stand beside the held-out rows; more have a table of their own."""
GENERAL = (GENERAL_QUESTIONS, GENERAL_TEXTS)


def table(run: Run, with_intervals: bool = False) -> list[dict[str, str]]:
    """Return a row of cells for each model, by column title: every score with its standard error and its n.

    With intervals, each score of held-out rows has its 95% interval too.
    """
    base, tuned = read_evaluation(run)
    return compare_models(base["results"], tuned["results"], with_intervals)


def compare_models(
    base: dict[str, Result], tuned: dict[str, Result], with_intervals: bool = False
) -> list[dict[str, str]]:
    """Return the cells of `table` for the results of two models by task; a base that was not asked has no row."""
    if not base:
        return compare_models(tuned, tuned, with_intervals)[-1:]
    tasks = public_tasks(base)
    by_model = {"base, zero-shot": base, "tuned": tuned}
    if len(tasks) > MOST_COLUMNS and HELD_OUT in base:
        tasks = []
    if HELD_OUT not in base and len(tasks) > MOST_COLUMNS:
        return _by_task(base, tuned)
    if HELD_OUT not in base:
        return [{"model": model} | _task_cells(results, tasks) for model, results in by_model.items()]
    held_out = {"base, zero-shot": base[HELD_OUT]}
    if FEW_SHOT in base:
        held_out[f"base, {base[FEW_SHOT]['shots']}-shot"] = base[FEW_SHOT]
    held_out["tuned"] = tuned[HELD_OUT]
    return [
        {"model": model} | _held_out_cells(result, with_intervals) | _task_cells(by_model.get(model, {}), tasks)
        for model, result in held_out.items()
    ]


def task_table(run: Run) -> list[dict[str, str]]:
    """Return a row of cells for each task where `table` has no room for them; no rows where it has."""
    return compare_tasks(*(one["results"] for one in read_evaluation(run)))


def compare_tasks(base: dict[str, Result], tuned: dict[str, Result]) -> list[dict[str, str]]:
    """Return the cells of `task_table` for the results of two models by task."""
    return _by_task(base, tuned) if HELD_OUT in base and len(public_tasks(base)) > MOST_COLUMNS else []


def _by_task(base: dict[str, Result], tuned: dict[str, Result]) -> list[dict[str, str]]:
    models = {"base, zero-shot": base, "tuned": tuned}
    return [
        {"task": task} | {model: _task_cells(results, [task])[task] for model, results in models.items()}
        for task in public_tasks(base)
    ]


def public_tasks(results: Mapping[str, Result]) -> list[str]:
    """Return the tasks beside held-out rows and general questions: a group stands for its tasks."""
    return [task for task, result in results.items() if is_shown(task, result) and task not in (HELD_OUT, FEW_SHOT)]


def is_shown(task: str, result: Result) -> bool:
    """Tell whether a task has a place in the tables: general questions have a line, and a group's tasks have none."""
    return task not in GENERAL and "group" not in result


def forgetting_lines(run: Run) -> list[str]:
    """Say what the training cost on general questions and texts, where they were asked."""
    base, tuned = read_evaluation(run)
    gaps = tuned.get("differences", {}).get("base, zero-shot", {})
    return forgetting_notes(base["results"], tuned["results"], gaps)


def base_note(run: Run) -> str | None:
    """Say over which base both models answered where that was not the whole one."""
    quantize = (read_json(run.eval / "tuned.json").get("settings") or {}).get("quantize") or "none"
    if quantize == "none":
        return None
    return f"Base and tuned model answered over the {quantize.replace('bit', '-bit')} base that was trained."


def batch_notes(tuned: Evaluation, base: Evaluation) -> list[str]:
    """Say, by task, in which batches base and tuned model were asked where those differ, as kept answers may."""
    return [
        f"{task}: at most {before} rows a batch for the base's {what}, and {rows[what]} for the tuned model's; "
        "in 16 bits they round otherwise, so a greedy answer may turn"
        for task, result in tuned["results"].items()
        if (rows := result.get("batch_rows")) and task in base["results"]
        for what, before in base["results"][task].get("batch_rows", {}).items()
        if before != rows.get(what, before)
    ]


def selection_note(run: Run) -> str | None:
    """Say that the weights were chosen by the rows that the results are told on, where that is so."""
    recipe = run.recipe()
    if not recipe.train.keep_best or recipe.data.test:
        return None
    return "The best checkpoint was chosen on these rows too, so the tuned model's results may be a little too good."


def comparison_note(run: Run) -> str | None:
    """Say what exact match compares where that is not the answers as they are."""
    compared = read_json(run.eval / "tuned.json")["results"].get(HELD_OUT, {}).get("compared", "text")
    return None if compared == "text" else f"Compared: {compared}."


def difference_table(run: Run) -> list[dict[str, str]]:
    """Return a row of cells for each metric, by column title: tuned minus base, and whether that is better or worse."""
    _, stored = read_evaluation(run)
    shots = (stored["settings"].get("held_out") or {}).get("shots")
    names = {"base, few-shot": f"base, {shots}-shot"}
    return [
        {"tuned against": names.get(other, other), "metric": _metric_title(stored["results"][task], task, metric)}
        | _gap_cells(gap)
        for other, tasks in stored["differences"].items()
        for task, metrics in tasks.items()
        if is_shown(task, stored["results"][task])
        for metric, gap in metrics.items()
    ]


def _metric_title(result: Result, task: str, metric: str) -> str:
    """Name a metric for people, with its task and with which direction is better."""
    name = TITLES.get(metric, metric) if task == HELD_OUT else f"{task}: {metric}"
    return f"{name} (lower is better)" if result.get("higher_is_better", {}).get(metric) is False else name


def _gap_cells(gap: Difference) -> dict[str, str]:
    bounds = format_interval(gap.get("interval"), "+")
    return {
        "difference": format_difference(gap),
        INTERVAL: bounds,
        "verdict": gap.get("verdict", ""),
        "n": str(gap["n"]),
    }


def task_title(task: str, result: Result) -> str:
    """Name a task for people: held-out rows by their number of shots, as zero-shot or 2-shot."""
    titles = {HELD_OUT: "zero-shot", FEW_SHOT: f"{result['shots']}-shot", TEXTS: "held-out texts"}
    is_text = task == HELD_OUT and result.get("compared") == TEXTS_COMPARED
    return "held-out texts" if is_text else titles.get(task, task)


def _rows(result: Result) -> str:
    """Say how many rows were scored, and of how many if not all were."""
    return str(result["n"]) if result["n"] == result["of"] else f"{result['n']} of {result['of']}"


def _held_out_cells(result: Result, with_intervals: bool) -> dict[str, str]:
    known, metrics = [name for name in TITLES if name in result["metrics"]], result["metrics"]
    patterns = [name for name in metrics if name not in TITLES]
    names = [*(name for name in known if name not in _LAST), *patterns, *(name for name in known if name in _LAST)]
    cells = {
        TITLES.get(name, name): format_score(
            metrics[name]["value"], metrics[name]["stderr"], metrics[name].get("interval") if with_intervals else None
        )
        for name in names
    }
    return {**cells, "n": _rows(result)}


def _task_cells(results: dict[str, Result], tasks: list[str]) -> dict[str, str]:
    """Return the first metric of each task with its n; a dash for a task that the model was not given."""
    return {task: _task_cell(results[task]) if task in results else "-" for task in tasks}


def _task_cell(result: Result) -> str:
    metric, score = next(iter(result["metrics"].items()))
    return f"{metric} {format_score(score['value'], score['stderr'])} (n {_rows(result)})"
