"""What `llmtune plan --methods` prints: each method's memory and time, what is known, and one recommendation."""

from typing import TYPE_CHECKING, Any

from llmtune.advising.limits import Limits
from llmtune.cli.output import results
from llmtune.errors import LlmtuneError, RecipeError
from llmtune.numbers import duration, size
from llmtune.recipe.sections import Recipe
from llmtune.working import importing

if TYPE_CHECKING:
    from llmtune.advising.advice import Advice
    from llmtune.advising.methods import MethodPrediction
    from llmtune.advising.rules import Rule

MOST_BEFORE = 3
"""Earlier comparisons that are quoted."""


def tell_methods(
    recipe: Recipe, gpu: str | None, budget: str | None, memory: str | None, methods: bool, as_json: bool
) -> None:
    """Advise on a recipe's method and print it; raises RecipeError for limits that are none."""
    limits = Limits.of(budget, memory)
    if not methods:
        option = f"--budget {budget}" if budget is not None else f"--memory {memory}"
        raise RecipeError(f"{option}: chooses among methods; add --methods")
    with results(as_json) as give:
        with importing():
            from llmtune.advising.advice import advise
        advice = advise(recipe, gpu, limits)
        linear = _linear_model(recipe) if advice.facts.labels else None
        give({**advice.to_json(), "tf_idf": linear}, lambda: _show(advice, linear, gpu))


def _linear_model(recipe: Recipe) -> dict[str, Any] | None:
    """What a linear model over TF-IDF reaches on the recipe's held-out rows; None where it cannot be."""
    from llmtune.arms.tf_idf import score_tf_idf

    try:
        result = score_tf_idf(recipe)
    except LlmtuneError:
        return None
    if isinstance(result, str):
        return None
    return {"score": result.score, "rows": len(result.scores), "seconds": round(result.seconds, 3)}


def _show(advice: "Advice", linear: dict[str, Any] | None, gpu: str | None) -> None:
    from rich.table import Table

    from llmtune import terminal
    from llmtune.advising.advice import spoken_of

    terminal.console.print(f"[bold]methods[/bold]  on {gpu or 'this machine'}; time is of the training alone")
    table = Table(box=None, pad_edge=False)
    for title, justify in (("method", "left"), ("memory", "right"), ("time", "right"), ("fits", "left")):
        table.add_column(title, justify="right" if justify == "right" else "left")
    for one in advice.methods:
        table.add_row(*_row(advice, one))
    terminal.console.print(table)
    terminal.console.print("\n[bold]what is known[/bold]  (confidence; source)")
    fitting = [one.arm for one in advice.methods if one.arm not in advice.beyond]
    terminal.plain([_line(rule) for rule in spoken_of(advice.rules, fitting)])
    if linear:
        terminal.plain([_linear_words(linear)])
    terminal.plain([one.words for one in advice.before[:MOST_BEFORE]])
    terminal.console.print("\n[bold]recommended[/bold]")
    if advice.choice is None:
        terminal.plain([f"none within these limits: {advice.command}"])
        return
    terminal.plain([f"{advice.choice.arm}: {advice.choice.reason}", f"next: {advice.command}"])


def _row(advice: "Advice", one: "MethodPrediction") -> tuple[str, str, str, str]:
    name = f"{one.arm} (the recipe's)" if one.arm == advice.own else one.arm
    memory = "-" if one.bytes is None else size(one.bytes)
    time = "-" if one.seconds is None else duration(one.seconds)
    beyond = advice.beyond.get(one.arm)
    return name, memory, time, f"no: {beyond}" if beyond else "yes"


def _line(rule: "Rule") -> str:
    about = "" if rule.about == "general" else f"{rule.about}: "
    measured = f" Measured: {rule.measured}." if rule.measured else ""
    return f"- {about}{rule.advice} ({rule.confidence}; {rule.source}).{measured}"


def _linear_words(linear: dict[str, Any]) -> str:
    seconds = max(1, round(linear["seconds"]))
    reached = f"- a linear model over TF-IDF reaches {linear['score']:.2f} on {linear['rows']:,} held-out rows"
    return f"{reached} in {seconds} s: a tuned model has to beat that"
