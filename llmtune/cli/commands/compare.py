"""compare: arms of a recipe side by side."""

from pathlib import Path
from typing import Any

from llmtune.arms.record import Comparison
from llmtune.cli.comparing import Arms, Baselines, Comparable, CompareOut, Equal, Minutes, On, Seeds, Sizes, Strict
from llmtune.cli.options import Json, Set, Verbose
from llmtune.cli.output import results
from llmtune.errors import RecipeError


def compare(
    recipe: Comparable,
    arms: Arms = None,
    minutes: Minutes = None,
    seeds: Seeds = None,
    sizes: Sizes = None,
    baselines: Baselines = None,
    equal: Equal = None,
    out: CompareOut = None,
    on: On = "local",
    strict: Strict = False,
    set: Set = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compare arms of a recipe on its held-out rows."""
    with results(as_json) as give:
        from llmtune.comparing.compare import compare as run

        comparison = run(
            recipe,
            words(arms, "--arms") or (),
            minutes=minutes,
            seeds=seeds,
            sizes=_numbers(sizes),
            baselines=() if baselines == "none" else words(baselines, "--baselines"),
            equal=equal,
            out=out,
            on=on,
            strict=strict,
            set=set or [],
        )
        folder = out or (recipe if recipe.is_dir() else Path("compare") / recipe.stem)
        give(dict(comparison), lambda: _show(comparison, folder))


def words(text: str | None, option: str) -> list[str] | None:
    """The words of an option that are joined by commas; None where it was not given, RecipeError where it has none."""
    given = None if text is None else [word.strip() for word in text.split(",") if word.strip()]
    if given == []:
        raise RecipeError(f"{option} {text!r}: names nothing; leave the option out for what is usual")
    return given


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(word) for word in words(text, "--sizes") or ()]
    except ValueError:
        raise RecipeError(
            f"--sizes {text[:40] if text else ''}: shares of the training rows, as in 0.1,0.3,1"
        ) from None


def _show(comparison: Comparison, folder: Path) -> None:
    """The table, what it says, and where the page and the winner's recipe are."""
    from llmtune import terminal
    from llmtune.arms.table import table

    verdict: Any = comparison["verdict"]
    print()
    terminal.rows(table(comparison, verdict))
    terminal.plain(["", *verdict["sentences"], *verdict["notes"], "", f"page    {folder / 'index.html'}"])
    if verdict["winner"]:
        winner = folder / "winner.yaml"
        terminal.plain([f"recipe  {winner}", "", f"next: llmtune run {winner}"])
