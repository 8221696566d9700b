"""report(run): one HTML page that opens offline, on whatever the run has done so far."""

from pathlib import Path

from llmtune import __version__
from llmtune.errors import LlmtuneError
from llmtune.files import write_text
from llmtune.plan.table import PlanTable
from llmtune.recipe.sections import Recipe
from llmtune.reporting.course.loss import loss_section
from llmtune.reporting.course.memory import memory_section
from llmtune.reporting.course.rates import rates_section
from llmtune.reporting.course.throughput import throughput_section
from llmtune.reporting.course.time import time_section
from llmtune.reporting.document import document
from llmtune.reporting.evaluations import read_evaluations
from llmtune.reporting.examples import examples_section
from llmtune.reporting.header import header, tiles, title
from llmtune.reporting.history import History, read_history
from llmtune.reporting.html import Html, section, tag
from llmtune.reporting.layers import trained_section
from llmtune.reporting.record import combination_section, data_section, files_section, merge_section
from llmtune.reporting.results import results_section
from llmtune.reporting.settings import settings_section
from llmtune.reporting.values import read_object
from llmtune.run import Run
from llmtune.run_log import read_log


def report(run: Run) -> Path:
    """Write the run's report.html and return its path; each step that is not done yet gets one line."""
    write_text(run.report_file, render(run))
    run.mark("report", [run.report_file])
    return run.report_file


def render(run: Run) -> str:
    """Return the page of a run as it is now."""
    settings, manifest = run.recipe(), run.manifest()
    plan, findings = _read_plan(run), read_object(run.data_file)
    history, evaluations = read_history(read_log(run.log_file)), read_evaluations(run)
    body = [
        *header(run, settings, plan, findings, history),
        tiles(evaluations, plan, history),
        results_section(settings, evaluations),
        *([combination_section(run.combined)] if run.combined else _training_sections(history, plan)),
        examples_section(evaluations),
        data_section(findings),
        merge_section(manifest),
        settings_section(settings, run.recipe_file.read_text(encoding="utf-8")),
        files_section(manifest, plan, findings),
        _next_section(run, settings),
        tag("footer", f"Written by llmtune {__version__}. This page is one file and loads nothing."),
    ]
    return document(title(run, settings, plan), body)


def _training_sections(history: History, plan: PlanTable | None) -> list[Html | None]:
    return [
        loss_section(history, plan),
        trained_section(plan, history.notes),
        rates_section(history, plan),
        throughput_section(history, plan),
        memory_section(history),
        time_section(history),
    ]


def _read_plan(run: Run) -> PlanTable | None:
    """Return the plan; None for one that is absent, damaged or of another version."""
    try:
        return PlanTable.read(run.plan_file)
    except LlmtuneError:
        return None


def _next_section(run: Run, settings: Recipe) -> Html:
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
    return section("Next", tag("pre", tag("code", "\n".join(lines), load if merged else None), tabindex=0))
