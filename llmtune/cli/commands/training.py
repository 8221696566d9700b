"""Commands that train: run and train."""

import sys

from llmtune.api.job import begin, complete, is_run
from llmtune.api.steps import at_work
from llmtune.cli.options import Either, Json, Out, Overwrite, Set, Verbose
from llmtune.cli.output import outcome, results, tell_notes
from llmtune.errors import RecipeError
from llmtune.run import Run


def run(
    recipe: Either,
    set: Set = None,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Take a recipe, or a run, through every step that is not done yet."""
    if overwrite and is_run(recipe):
        again = f"llmtune train {recipe} --overwrite"
        raise RecipeError(f"--overwrite: is for a recipe; {recipe} is a run. To train it again: {again}")
    job = begin(recipe, out, overwrite=overwrite, set=set or [])
    tell_notes(job.settings)
    with results(as_json) as give:
        from llmtune import terminal

        done = complete(job, terminal.heading)
        give(outcome(done) if as_json else None, lambda: terminal.summary(done))


def train(
    recipe: Either,
    set: Set = None,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train a recipe or a run, from its newest checkpoint."""
    job = begin(recipe, out, overwrite=overwrite, set=set or [])
    tell_notes(job.settings)
    again = f"it is trained already; to train it again, from the start: llmtune train {job.run.path} --overwrite"
    if not job.is_new and not overwrite and job.run.done("train"):
        print(f"llmtune: {job.run.path}: {again}", file=sys.stderr)
    with results(as_json) as give:
        with at_work(job.run):
            job.train()
        done = Run(job.run.path)
        give(outcome(done) if as_json else None, lambda: print(f"delta   {done.delta}"))
