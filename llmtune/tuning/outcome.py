"""What a search came to, as plain values, as a recipe that runs, and as a table."""

from llmtune import __version__
from llmtune.errors import LlmtuneError, RecipeError, TrainingError
from llmtune.files import write_json, write_text
from llmtune.numbers import duration
from llmtune.recipe.standing import recipe_text
from llmtune.searching.file import address
from llmtune.searching.record import SearchRecord, TrialRecord
from llmtune.searching.space import Range, shown
from llmtune.searching.study import Study, Tried
from llmtune.tuning.dealer import HOPELESS
from llmtune.tuning.files import Folder
from llmtune.tuning.request import Request

VERSION = 1


def record_of(request: Request, study: Study, folder: Folder, best: Tried) -> SearchRecord:
    """The search as plain values."""
    return SearchRecord(
        version=VERSION,
        recipe=str(request.file),
        set=list(request.set),
        base=request.recipe.model.base,
        method=request.recipe.method_words,
        over={key: str(one) for key, one in request.space.items()},
        log=[key for key, one in request.space.items() if isinstance(one, Range) and one.log],
        trials=[_trial(tried) for tried in study.ended],
        best=best.number,
        importance=study.importances(),
        seconds=round(study.seconds, 1),
        winner=str(folder.best),
        study=address(folder.study),
        page=str(folder.page),
    )


def best_of(study: Study, request: Request, exit_code: int) -> Tried:
    """The best trial; raises the error of the search where none came to its end."""
    best = study.best
    if best is not None:
        return best
    trials = study.trials
    failed = [tried for tried in trials if tried.state == "failed" and tried.reason]
    ended = next((tried for tried in reversed(trials) if tried.reason == "out of time"), None)
    if ended is not None and request.minutes:
        points, steps = ended.facts.get("points", []), int(ended.facts.get("total", 0))
        need = f"; the first one needs about {_minutes(ended.seconds, points[-1]['step'], steps)}" if points else ""
        raise RecipeError(f"--minutes {request.minutes:g}: no trial came to its end{need}; give more and go on")
    if not failed:
        raise TrainingError("no trial came to its end; the same command goes on")
    many = f"the first {len(failed)} trials failed" if len(failed) >= HOPELESS else f"{len(failed)} trials failed"
    error = LlmtuneError(f"{many}, and none came to its end; the last one: {failed[-1].reason}")
    error.exit_code = exit_code or TrainingError.exit_code
    raise error


def write(record: SearchRecord, request: Request, folder: Folder) -> None:
    """Write best.yaml, tune.json and the page."""
    from llmtune.reporting.studies.page import render

    write_text(folder.best, _winner(record, request))
    write_json(folder.record, record)
    write_text(folder.page, render(record))


def table_lines(record: SearchRecord) -> list[str]:
    """The trials, the best one first, a line each, and what explains the differences."""
    keys = list(record["over"])
    head = ["trial", *keys, "loss", "time", ""]
    ranked = sorted(record["trials"], key=lambda one: (_rank(one), one["loss"] or 0.0, one["number"]))
    rows = [head, *(_cells(one, keys, record["best"]) for one in ranked)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(head) - 1)]
    lines = ["  ".join([*(cell.rjust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    shares = ", ".join(f"{key} {share:.0%}" for key, share in record["importance"].items())
    return [*(line.rstrip() for line in lines), *([f"what explains the differences: {shares}"] if shares else [])]


def _trial(tried: Tried) -> TrialRecord:
    record = TrialRecord(
        number=tried.number,
        values=tried.values,
        state=tried.state,
        loss=tried.loss,
        seconds=round(tried.seconds, 1),
        steps=tried.facts.get("steps"),
        curve=tried.facts.get("points", []),
    )
    if tried.reason:
        record["reason"] = tried.reason
    return record


def _winner(record: SearchRecord, request: Request) -> str:
    """The recipe with the best values, and where they come from."""
    best = next(one for one in record["trials"] if one["number"] == record["best"])
    states = [one["state"] for one in record["trials"]]
    counts = f"{len(states)} trials ({states.count('pruned')} ended early, {states.count('failed')} failed)"
    over = ", ".join(f"{key} over {spec}" for key, spec in record["over"].items())
    return recipe_text(
        request.with_values(best["values"]),
        [
            f"Written by llmtune {__version__}: {request.file} with the best of {counts}: {shown(best['values'])}.",
            f"Searched: {over}. Its validation loss was {best['loss']:.4g} (trial {best['number']}).",
            f"Train it: llmtune run {record['winner']}",
        ],
    )


def _rank(one: TrialRecord) -> int:
    return ("complete", "pruned", "failed").index(one["state"])


def _cells(one: TrialRecord, keys: list[str], best: int) -> list[str]:
    values = [shown({key: one["values"][key]}).removeprefix(f"{key} ") if key in one["values"] else "" for key in keys]
    loss = "" if one["loss"] is None else f"{one['loss']:.4f}"
    note = "best" if one["number"] == best else one.get("reason", "")
    return [str(one["number"]), *values, loss, duration(one["seconds"]), note]


def _minutes(seconds: float, step: int, steps: int) -> str:
    """How long a training takes by what its first steps took."""
    return f"{seconds * steps / max(1, step) / 60:.2g} minutes" if steps > step else "a little more"
