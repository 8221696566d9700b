"""combine: several runs' deltas as one."""

from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from llmtune import api
from llmtune.cli.options import Density, Folders, How, Json, NewFolder, Seed, Verbose, Weights
from llmtune.cli.output import results


class Weighted(TyperCommand):
    """A command whose --weights takes all the numbers behind it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words after each number behind --weights got an option of its own."""
        return super().parse_args(ctx, spread(args))


def spread(words: list[str]) -> list[str]:
    """The words with `--weights 0.7 0.3` written as `--weights=0.7 --weights=0.3`."""
    options: list[str] = []
    begins = goes_on = False
    for word in words:
        if word == "--weights":
            begins = True
        elif begins or (goes_on and _is_number(word)):
            options.append(f"--weights={word}")
            begins, goes_on = False, True
        else:
            options.append(word)
            goes_on = word.startswith("--weights=")
    return [*options, *(["--weights"] if begins else [])]


def _is_number(word: str) -> bool:
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
