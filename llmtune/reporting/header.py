"""The top of the page: title, method in words, what a reader needs to name the run, and its key numbers."""

from llmtune.combining.words import combined_words
from llmtune.model.files.converted import stored_words
from llmtune.numbers import count, duration, size
from llmtune.plan.table import BaseName, PlanTable
from llmtune.recipe.sections import Recipe
from llmtune.reporting.evaluations import Evaluations
from llmtune.reporting.history import History
from llmtune.reporting.html import Html, facts, tag
from llmtune.reporting.results import best_exact_match, best_perplexity
from llmtune.reporting.values import JSON, mapping, moment, number, read_object, text, whole
from llmtune.run import Run


def title(run: Run, settings: Recipe, plan: PlanTable | None) -> str:
    """Name the run by its folder and its base."""
    name = _base(run, settings, plan)
    base = name.hub_id or name.name
    return f"{run.path.resolve().name}: {base.rstrip('/').rsplit('/', 1)[-1].removeprefix('package:')}"


def _base(run: Run, settings: Recipe, plan: PlanTable | None) -> BaseName:
    """The base by the plan; by the delta where nothing was planned, as in a combined run; else by the recipe."""
    if plan:
        return plan.base
    stored = read_object(run.delta / "base.json") if run.delta.is_dir() else {}
    return BaseName(text(stored.get("base")) or settings.model.base, None, text(stored.get("hub_id")))


def method_in_words(settings: Recipe, plan: PlanTable | None) -> str:
    """Name the method, and what the plan makes of it."""
    method = f"Training by {settings.method_words}"
    if plan is None:
        return method
    trains = ", then ".join(stage.trains.words(plan.blocks) for stage in plan.stages)
    falls = any(min(stage.rates.values()) < max(stage.rates.values()) for stage in plan.stages)
    rates = " at rates that fall towards the input" if falls else " at one rate" if len(plan.stages) == 1 else ""
    return f"{method}: {trains}{rates}"


def conversion_in_words(converted: JSON) -> str | None:
    """Say what a converted base was: how many of its tensors were stored in which type; None if it was not."""
    types = {name: tensors for name, value in mapping(converted.get("types")).items() if (tensors := whole(value))}
    return f"weights converted from {converted.get('file') or 'a .gguf file'}, {stored_words(types)}" if types else None


def header(run: Run, settings: Recipe, plan: PlanTable | None, findings: JSON, history: History) -> list[Html | None]:
    """Show title, the method in words, and base, data and time of the run."""
    base = _base(run, settings, plan)
    name = f"{base.hub_id} (from {base.name})" if base.hub_id not in (None, base.name) else base.name
    stored = mapping(read_object(run.delta / "base.json").get("converted")) if run.delta.is_dir() else {}
    pairs: list[tuple[str, object]] = [
        ("base", name),
        ("trained on", conversion_in_words(stored)),
        ("goes on from", _start(run)),
        ("training", _training(settings, plan, findings)),
        ("finished", _progress(run, plan, history)),
        ("weights", _kept(run)),
    ]
    words = combined_words(run.combined) if run.combined else method_in_words(settings, plan)
    lede = tag("p", words[:1].upper() + words[1:], class_="lede")
    return [tag("h1", title(run, settings, plan), dir="auto"), lede, facts(pairs)]


def _start(run: Run) -> str | None:
    """What training went on from, with the beginning of its SHA-256."""
    start = mapping(run.manifest().get("start"))
    return f"{start.get('name')} (SHA-256 {str(start.get('sha256'))[:12]})" if start else None


def _training(settings: Recipe, plan: PlanTable | None, findings: JSON) -> str | None:
    if plan is None:
        return None
    rows = whole(mapping(findings.get("rows")).get("train"))
    amount = f"{rows:,} rows, " if rows else ""
    return f"{amount}{plan.steps:,} steps of {settings.train.batch_size} rows, seed {settings.train.seed}"


def _progress(run: Run, plan: PlanTable | None, history: History) -> str:
    """When training finished, or how far it came."""
    entry = run.manifest()["steps"].get("train")
    if entry is not None:
        return moment(entry.get("finished")) or "yes, at a time that was not recorded"
    if not history.last_step:
        return "not trained yet"
    of = f" of {plan.steps:,}" if plan else ""
    return f"not yet: step {history.last_step:,}{of} is the last one in the log"


def _kept(run: Run) -> str | None:
    """Which checkpoint the weights are from and why, where it was chosen."""
    best = mapping(mapping(run.manifest()["steps"].get("train")).get("best"))
    return text(best.get("in_words"))


def tiles(evaluations: Evaluations | None, plan: PlanTable | None, history: History) -> Html | None:
    """Show the key numbers of the run, as far as they are known."""
    pairs: list[tuple[str, str]] = []
    match = best_exact_match(evaluations)
    if match:
        pairs.append((f"{match[0]:.3f}", f"exact match; {match[1]}: {match[2]:.3f}"))
    perplexity = best_perplexity(evaluations)
    if perplexity:
        pairs.append((f"{perplexity[0]:.2f}", f"perplexity of held-out texts; base: {perplexity[1]:.2f}"))
    if history.validations:
        pairs.append(_validation([number(record["eval_loss"]) for record in history.validations]))
    if history.seconds:
        speed = f", {history.tokens / history.seconds:,.0f} tokens/s" if history.tokens else ""
        pairs.append((duration(history.seconds), f"training{speed}"))
    if history.peak_memory_mb:
        pairs.append((size(history.peak_memory_mb * 2**20), "peak memory"))
    if plan:
        share = plan.trained / plan.parameters
        pairs.append((count(plan.trained), f"parameters trained, {share:.1%} of the model"))
    cells = (tag("div", tag("b", value), tag("span", label)) for value, label in pairs)
    return tag("div", *cells, class_="tiles") if pairs else None


def _validation(losses: list[float | None]) -> tuple[str, str]:
    first, last = ("not finite" if loss is None else f"{loss:.3f}" for loss in (losses[0], losses[-1]))
    return last, f"validation loss, first {first}" if len(losses) > 1 else "validation loss"
