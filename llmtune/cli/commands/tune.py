"""tune: values of a recipe's keys, searched by the validation loss."""

from llmtune.cli.commands.several import Several
from llmtune.cli.options import Json, Over, Place, RecipeFile, SearchFolder, SearchMinutes, Seed, Set, Trials, Verbose
from llmtune.cli.output import results


class Spread(Several):
    """A command whose --over takes all the words behind it."""

    option = "--over"

    @staticmethod
    def fits(word: str) -> bool:
        """Whether a word gives values to a key."""
        return "=" in word and not word.startswith("-")


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
