"""tune: values of a recipe's keys, searched by the validation loss."""

from typing import Any

from typer.core import TyperCommand

from llmtune.cli.options import Json, Over, Place, RecipeFile, SearchFolder, SearchMinutes, Seed, Set, Trials, Verbose
from llmtune.cli.output import results


class Spread(TyperCommand):
    """A command whose --over takes all the words behind it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words after each one behind --over as options of their own."""
        return super().parse_args(ctx, spread(args))


def spread(words: list[str]) -> list[str]:
    """The words with `--over a=1,2 b=3,4` written as `--over=a=1,2 --over=b=3,4`."""
    options: list[str] = []
    begins = goes_on = False
    for word in words:
        if word == "--over":
            begins = True
        elif begins or (goes_on and "=" in word and not word.startswith("-")):
            options.append(f"--over={word}")
            begins, goes_on = False, True
        else:
            options.append(word)
            goes_on = word.startswith("--over=")
    return [*options, *(["--over"] if begins else [])]


def tune(
    recipe: RecipeFile,
    over: Over = None,
    trials: Trials = None,
    minutes: SearchMinutes = None,
    set: Set = None,
    out: SearchFolder = None,
    on: Place = "local",
    seed: Seed = 0,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Search values of a recipe's keys by the validation loss."""
    with results(as_json) as give:
        from llmtune import terminal
        from llmtune.tuning.outcome import table_lines
        from llmtune.tuning.step import tune as search

        record = search(recipe, over or [], set=set or [], trials=trials, minutes=minutes, out=out, on=on, seed=seed)
        closing = [
            "",
            f"best   {record['winner']}",
            f"page   {record['page']}",
            f"study  optuna-dashboard {record['study']}",
            f"\nnext: llmtune run {record['winner']}",
        ]
        give(record, lambda: terminal.plain(["", *table_lines(record), *closing]))
