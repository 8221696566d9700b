"""report(run): one HTML page that opens offline, on whatever the run has done so far."""

from datetime import datetime
from pathlib import Path
from typing import Any

from llmtune import __version__
from llmtune.files import read_json, write_text
from llmtune.plan.table import BaseName, PlanTable
from llmtune.recipe.sections import Recipe
from llmtune.reporting.html import Html, facts, section, tag
from llmtune.reporting.record import data_section, files_section, merge_section
from llmtune.reporting.results import cases_section, next_section, read_evaluations, results_section, tiles
from llmtune.reporting.training import loss_section, rates_section, trained_section
from llmtune.run import Run
from llmtune.run_log import read_log

Json = dict[str, Any]

# The page can load nothing, whatever is in the text of a data row.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def report(run: Run) -> Path:
    """Write the run's report.html and return its path; each step that is not done yet gets one line."""
    settings = run.recipe()
    plan = PlanTable.read(run.plan_file) if run.plan_file.is_file() else None
    findings = read_json(run.data_file) if run.data_file.is_file() else {}
    log, manifest = read_log(run.log_file), run.manifest()
    stored = read_evaluations(run)
    body = [
        *_header(run, settings, plan, findings, manifest),
        tiles(stored, plan, log),
        results_section(run, settings, stored),
        cases_section(stored),
        loss_section(log, plan),
        rates_section(log, plan),
        trained_section(log, plan),
        data_section(findings),
        merge_section(manifest),
        files_section(manifest),
        section("Recipe", tag("pre", tag("code", run.recipe_file.read_text(encoding="utf-8").rstrip()))),
        next_section(run, settings),
        tag("footer", f"Written by llmtune {__version__}. This page is one file and loads nothing."),
    ]
    write_text(run.report_file, _page(_title(run, settings), body))
    run.mark("report", [run.report_file])
    return run.report_file


def _page(title: str, body: list[Html | None]) -> str:
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", title),
        tag("style", Html(style)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', *body), lang='en')}\n"


def _title(run: Run, settings: Recipe) -> str:
    return f"{run.path.resolve().name}: {_base_name(settings)}"


def _base_name(settings: Recipe) -> str:
    return settings.model.base.rstrip("/").rsplit("/", 1)[-1].removeprefix("package:")


def _header(run: Run, settings: Recipe, plan: PlanTable | None, findings: Json, manifest: Json) -> list[Html]:
    """Title, the method in words, and what a reader needs to name this run exactly."""
    train = manifest["steps"].get("train", {})
    hashes = {name: one["sha256"] for name, one in train.get("files", {}).items() if name.endswith(".safetensors")}
    rows = findings.get("rows", {}).get("train")
    once = f"{rows:,} rows, " if rows else ""
    steps = f"{plan.steps:,} steps of {settings.train.batch_size} rows" if plan else None
    base = plan.base if plan else BaseName(settings.model.base, None, None)
    pairs: list[tuple[str, object]] = [
        ("base", f"{base.hub_id} (from {base.name})" if base.hub_id not in (None, base.name) else base.name),
        ("revision", tag("code", base.revision) if base.revision else None),
        ("training", f"{once}{steps}, seed {settings.train.seed}" if steps else None),
        *(("weights, SHA-256", tag("code", digest)) for digest in hashes.values()),
        ("finished", f"{datetime.fromisoformat(train['finished']):%Y-%m-%d %H:%M} UTC" if train else "not trained yet"),
    ]
    return [tag("h1", _title(run, settings)), tag("p", method_in_words(settings, plan), class_="lede"), facts(pairs)]


def method_in_words(settings: Recipe, plan: PlanTable | None) -> str:
    """What the recipe calls its method and adapter, and what the plan makes of them."""
    method = f"{settings.method.kind}, {settings.method.adapter.in_words()}"
    if plan is None:
        return method
    trains = ", then ".join(stage.trains.words(plan.blocks) for stage in plan.stages)
    falls = any(min(stage.rates.values()) < max(stage.rates.values()) for stage in plan.stages)
    rates = " at rates that fall towards the input" if falls else " at one rate" if len(plan.stages) == 1 else ""
    return f"{method}: {trains}{rates}"
