"""Commands before a training: init, recipes, check, plan and schema."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli import shipped
from llmtune.cli.fit import check_card, lines, predict
from llmtune.cli.options import (
    Budget,
    Data,
    Gpu,
    Json,
    MemoryLimit,
    Method,
    Methods,
    Model,
    NewFile,
    RecipeFile,
    Set,
    Verbose,
)
from llmtune.cli.output import results, tell_notes
from llmtune.errors import RecipeError
from llmtune.recipe.sections import Recipe, schema
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
        written, notes, advice = write_recipe(file or data, model, method, out or Path("recipe.yaml"))
        for note in notes:
            print(f"llmtune: note: {note}", file=sys.stderr)

        def show() -> None:
            print(*advice.lines, sep="\n")
            print(f"what each method takes here: llmtune plan {written} --methods")
            print(f"wrote {written}; next: llmtune check {written}")

        give({"recipe": written, "notes": notes, "advised": asdict(advice)}, show)


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


def plan(
    recipe: RecipeFile,
    set: Set = None,
    gpu: Gpu = None,
    methods: Methods = False,
    budget: Budget = None,
    memory: MemoryLimit = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Print a recipe's plan, and whether it fits this machine or a card; or what every method takes there."""
    settings = Recipe.load(recipe, set or [])
    tell_notes(settings)
    check_card(gpu)
    if methods or budget is not None or memory is not None:
        from llmtune.cli.methods import tell_methods

        tell_methods(settings, gpu, budget, memory, methods, as_json)
        return
    with results(as_json) as give:
        from llmtune import terminal
        from llmtune.machine.gpus import count_gpus

        with importing():
            from llmtune.training.prepare import outline
        planned = outline(settings, count_gpus())
        prediction = predict(settings, planned, gpu)

        def show() -> None:
            terminal.plan(planned.table)
            terminal.plain(lines(prediction))

        give({**planned.table.to_json(), "memory": prediction.to_json()}, show)


def print_schema(verbose: Verbose = False) -> None:
    """Print the JSON schema of recipes."""
    print(json.dumps(schema(), indent=2))
