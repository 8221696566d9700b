"""The commands: one function each; whatever is heavy is imported inside the function that needs it."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from llmtune import api
from llmtune.cli import shipped
from llmtune.cli.fit import check_card, lines, predict
from llmtune.cli.options import (
    Data,
    DryRun,
    Either,
    Folder,
    Gpu,
    Json,
    MaxNewTokens,
    Method,
    Model,
    NewFile,
    Out,
    Overwrite,
    RecipeFile,
    Seed,
    Set,
    SetAgain,
    Temperature,
    TopP,
    Verbose,
)
from llmtune.cli.output import outcome, results, scores, tell_notes
from llmtune.errors import RecipeError
from llmtune.recipe.sections import Recipe, schema
from llmtune.run import Run, open_run
from llmtune.working import importing


def init(
    file: Data = None,
    data: Annotated[Path | None, typer.Option("--data", metavar="FILE", help="The same as FILE.")] = None,
    model: Model = None,
    method: Method = None,
    out: NewFile = Path("recipe.yaml"),
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a recipe for a user's rows."""
    from llmtune.cli.init import write_recipe

    if file is not None and data is not None:
        raise RecipeError(f"--data {data}: {file} is named already; give one of them")
    with results(as_json) as give:
        written, notes = write_recipe(file or data, model, method, out or Path("recipe.yaml"))
        for note in notes:
            print(f"llmtune: note: {note}", file=sys.stderr)
        give({"recipe": written, "notes": notes}, lambda: print(f"wrote {written}; next: llmtune check {written}"))


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(help="A shipped recipe.", show_default="list them", autocompletion=shipped.complete),
    ] = None,
    out: NewFile = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """List the shipped recipes, or copy one."""
    if out is not None and name is None:
        raise RecipeError(f"-o {out}: is for a copy; name the recipe: llmtune recipes NAME -o {out}")
    with results(as_json) as give:
        if name is None:
            listed = [{"name": key, "what": shipped.purpose(file)} for key, file in shipped.recipes().items()]
            give({"recipes": listed}, lambda: shipped.show(listed))
        else:
            copy = shipped.copy(name, out)
            give({"name": name, "recipe": copy}, lambda: print(f"wrote {copy}; next: llmtune check {copy}"))


def check(recipe: RecipeFile, set: Set = None, as_json: Json = False, verbose: Verbose = False) -> None:
    """Validate a recipe and its data."""
    settings = Recipe.load(recipe, set or [])
    tell_notes(settings)
    with results(as_json) as give:
        from llmtune import terminal
        from llmtune.machine.gpus import count_gpus

        with importing():  # only now: a mistake in the recipe is answered at once
            from llmtune.training.prepare import examine
        examination = examine(settings, count_gpus())
        findings, table = examination.data.findings, examination.table
        memory = predict(settings, examination, None)

        def show() -> None:
            terminal.findings(findings)
            terminal.plan(table)
            terminal.plain(lines(memory))

        give({"data": findings, "plan": table.to_json(), "memory": memory.to_json()}, show)


def plan(recipe: RecipeFile, set: Set = None, gpu: Gpu = None, as_json: Json = False, verbose: Verbose = False) -> None:
    """Print a recipe's plan, and whether it fits this machine or a card."""
    settings = Recipe.load(recipe, set or [])
    tell_notes(settings)
    check_card(gpu)
    with results(as_json) as give:
        from llmtune import terminal
        from llmtune.machine.gpus import count_gpus

        with importing():
            from llmtune.training.prepare import outline
        planned = outline(settings, count_gpus())
        memory = predict(settings, planned, gpu)

        def show() -> None:
            terminal.plan(planned.table)
            terminal.plain(lines(memory))

        give({**planned.table.to_json(), "memory": memory.to_json()}, show)


def run(
    recipe: Either,
    set: Set = None,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Take a recipe, or a run, through every step that is not done yet."""
    if overwrite and recipe.is_dir():
        again = f"llmtune train {recipe} --overwrite"
        raise RecipeError(f"--overwrite: is for a recipe; {recipe} is a run. To train it again: {again}")
    job = api.begin(recipe, out, overwrite=overwrite, set=set or [])
    tell_notes(job.settings)
    with results(as_json) as give:
        from llmtune import terminal

        done = api.complete(job, terminal.heading)
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
    job = api.begin(recipe, out, overwrite=overwrite, set=set or [])
    tell_notes(job.settings)
    again = f"it is trained already; to train it again, from the start: llmtune train {job.run.path} --overwrite"
    if not job.is_new and not overwrite and job.run.done("train"):
        print(f"llmtune: {job.run.path}: {again}", file=sys.stderr)
    with results(as_json) as give:
        with job.run.locked():
            job.train()
        done = Run(job.run.path)
        give(outcome(done) if as_json else None, lambda: print(f"delta   {done.delta}"))


def evaluate(run: Folder, set: SetAgain = None, as_json: Json = False, verbose: Verbose = False) -> None:
    """Evaluate base and tuned model."""
    with results(as_json) as give:
        api.evaluate(run, set=set or [])
        from llmtune import terminal

        done = open_run(run)
        give({"run": run, **scores(done)} if as_json else None, lambda: terminal.scores(done))


def merge(run: Folder, set: SetAgain = None, as_json: Json = False, verbose: Verbose = False) -> None:
    """Write full weights."""
    with results(as_json) as give:
        facts = api.merge(run, set=set or [])
        merged = open_run(run).merged
        give({"run": run, "merged": merged, **facts}, lambda: print(f"merged  {merged}"))


def publish(
    run: Folder, set: SetAgain = None, dry_run: DryRun = False, as_json: Json = False, verbose: Verbose = False
) -> None:
    """Upload to the Hub, or show what would be uploaded."""
    with results(as_json) as give:
        facts = api.publish(run, set=set or [], dry_run=dry_run)
        give({"run": run, **facts}, lambda: None)


def report(run: Folder, set: SetAgain = None, as_json: Json = False, verbose: Verbose = False) -> None:
    """Write the report page."""
    with results(as_json) as give:
        page = api.report(run, set=set or [])
        give({"run": run, "report": page}, lambda: print(page))


def chat(
    run: Folder,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = 256,
    seed: Seed = 0,
    verbose: Verbose = False,
) -> None:
    """Talk to base and tuned model."""
    folder = api.open_with(run, [])
    api.require_trained(folder)
    with importing():
        from llmtune.cli import chat as conversation
        from llmtune.cli.speakers import Sampling
    try:
        sampling = Sampling(temperature, top_p, max_new_tokens, seed)
    except ValueError as error:
        raise RecipeError(f"--{str(error).replace('_', '-')}") from error
    conversation.chat(folder, sampling=sampling)


def print_schema(verbose: Verbose = False) -> None:
    """Print the JSON schema of recipes."""
    print(json.dumps(schema(), indent=2))
