"""combine: several runs' deltas as one."""

from pathlib import Path

from llmtune import api
from llmtune.cli.commands.several import Several
from llmtune.cli.options import Density, Folders, How, Json, NewFolder, Seed, Verbose, Weights
from llmtune.cli.output import results


class Weighted(Several):
    """A command whose --weights takes all the numbers behind it."""

    option = "--weights"

    @staticmethod
    def fits(word: str) -> bool:
        """Whether a word is a number, and no file."""
        try:
            float(word)
        except ValueError:
            return False
        return not Path(word).exists()


def combine(
    runs: Folders,
    weights: Weights = None,
    how: How = "linear",
    density: Density = None,
    out: NewFolder = None,
    seed: Seed = 0,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Join the deltas of trained runs."""
    with results(as_json) as give:
        run = api.combine(runs, weights or None, how, density=density, out=out, seed=seed)
        facts = run.manifest()["steps"]["train"]["combined"]
        give({"run": run.path, **facts}, lambda: print(f"\ncombined  {run.path}\nnext: llmtune run {run.path}"))
