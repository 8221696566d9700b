"""The commands: arguments in, one function each; whatever is heavy is imported inside the function that needs it."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune import __version__
from llmtune.errors import TrainingError
from llmtune.launch.guard import guarded_step, run_command
from llmtune.launch.quiet import quiet_libraries

if TYPE_CHECKING:
    from llmtune.run import Run

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

Command = Callable[[argparse.Namespace], int | None]
Step = Callable[["Run"], object]


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; a user's mistake is one line on stderr."""
    options = _parser().parse_args(arguments)
    quiet_libraries()
    command: Command = options.command
    return run_command(lambda: command(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmtune", description="Fine-tune a language model from a recipe.")
    parser.add_argument("--version", action="version", version=f"llmtune {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_init(commands)
    _add_recipe_commands(commands)
    for name, command, text in (
        ("train", _train, "train, from the newest checkpoint"),
        ("eval", lambda options: _repeat(options, _evaluate), "evaluate base and tuned model"),
        ("merge", lambda options: _repeat(options, _merge), "write base + delta as full weights, with proof"),
        ("publish", lambda options: _repeat(options, _publish), "upload to the Hub as the recipe says"),
        ("report", _write_report, "write the report page"),
        ("chat", _chat, "talk to base and tuned model side by side"),
    ):
        step = _add(commands, name, command, text)
        step.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
        step.set_defaults(step=name)
    _add(commands, "schema", _schema, "print the recipe's JSON schema, for editors")
    return parser


def _add_init(commands: "Subparsers") -> None:
    init = _add(commands, "init", _init, "write a recipe for your data")
    init.add_argument(
        "--data", type=Path, metavar="FILE", help="your rows (default: the sample that ships with llmtune)"
    )
    init.add_argument("--model", metavar="ID", help="a Hub id, a folder, a .gguf file or package:NAME")
    init.add_argument("--method", metavar="M", help="a method such as full, frozen or gradual, or lora (default)")
    init.add_argument("-o", dest="out", type=Path, default=Path("recipe.yaml"), help="where to write it (recipe.yaml)")


def _add_recipe_commands(commands: "Subparsers") -> None:
    for name, command, text in (
        ("check", _check, "validate recipe and data and print what would be trained; nothing trains"),
        ("plan", _plan, "print which layers train in which steps, at which rate"),
        ("run", _run, "check, train, evaluate, merge and publish as the recipe says; or continue a run's folder"),
    ):
        parser = _add(commands, name, command, text)
        parser.add_argument("recipe", type=Path, metavar="RECIPE")
        parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a value")
        if name == "run":
            parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (runs/<recipe's name>)")
            parser.add_argument("--overwrite", action="store_true", help="remove the run that the folder holds")
        else:
            parser.add_argument("--json", action="store_true", help="print JSON")


def _add(commands: "Subparsers", name: str, command: Command, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=command)
    return parser


def _init(options: argparse.Namespace) -> None:
    from llmtune.cli.init import write_recipe

    written = write_recipe(options.data, options.model, options.method, options.out)
    print(f"wrote {written}; next: llmtune check {written}")


def _schema(options: argparse.Namespace) -> None:
    from llmtune.recipe.sections import schema

    print(json.dumps(schema(), indent=2))


def _check(options: argparse.Namespace) -> None:
    from llmtune import recipe

    settings = recipe.load(options.recipe, options.set)
    # Only now, as it imports torch: a mistake in the recipe is answered at once.
    from llmtune.launch.command import count_gpus
    from llmtune.terminal import findings, plan
    from llmtune.training.prepare import examine

    examination = examine(settings, count_gpus())
    checked, table = examination.data, examination.table
    if options.json:
        print(json.dumps({"data": checked.findings, "plan": table.to_json()}, indent=2, ensure_ascii=False))
    else:
        findings(checked.findings)
        plan(table)


def _plan(options: argparse.Namespace) -> None:
    from llmtune import recipe

    settings = recipe.load(options.recipe, options.set)
    from llmtune.launch.command import count_gpus
    from llmtune.terminal import plan
    from llmtune.training.prepare import plan_alone

    table = plan_alone(settings, count_gpus())
    if options.json:
        print(json.dumps(table.to_json(), indent=2))
    else:
        plan(table)


def _run(options: argparse.Namespace) -> None:
    """Take a recipe, or a run's folder, through every step that it asks for and that is not done yet."""
    from llmtune import recipe
    from llmtune.launch.process import train_in_children
    from llmtune.run import Run, open_run
    from llmtune.terminal import summary

    is_folder = options.recipe.is_dir()
    run = open_run(options.recipe) if is_folder else Run(options.out or Path("runs") / options.recipe.stem)
    settings = run.recipe() if is_folder else recipe.load(options.recipe, options.set)
    if settings.publish and not is_folder:
        from llmtune.publishing.step import preflight

        preflight(settings)
    with run.locked():
        if not is_folder:
            # The child prepares the run too: preparing here would import torch in two processes, one after the other.
            train_in_children(settings, run, _training_arguments(options, run))
        elif not run.done("train"):
            train_in_children(settings, run, [str(run.path)])
        if settings.eval.suite != "none" and not run.done("eval"):
            _finish(run, "eval", _evaluate)
        if settings.merge.enabled and not run.done("merge"):
            _finish(run, "merge", _merge)
        if settings.publish and not run.done("publish"):
            _finish(run, "publish", _publish)
        _finish(run, "report", _report)
    summary(run)


def _training_arguments(options: argparse.Namespace, run: "Run") -> list[str]:
    """What `python -m llmtune.train` reads of the options of `llmtune run`."""
    overrides = [f"--set={override}" for override in options.set]
    return [str(options.recipe), *overrides, f"--out={run.path}", *(["--overwrite"] if options.overwrite else [])]


def _finish(run: "Run", name: str, step: Step) -> None:
    """Do a step after training; whatever ends it, say that the delta is safe and how to continue."""
    from llmtune.terminal import heading

    heading(name)
    with guarded_step(run, name):
        step(run)


def _open(options: argparse.Namespace) -> "Run":
    from llmtune.run import open_run

    return open_run(options.run)


def _train(options: argparse.Namespace) -> None:
    """Train a run; one that is trained already is trained again, from the start."""
    from llmtune.launch.process import train_in_children

    run = _open(options)
    with run.locked():
        if run.done("train"):
            run.forget("train")
            shutil.rmtree(run.checkpoints, ignore_errors=True)
        train_in_children(run.recipe(), run, [str(run.path)])


def _repeat(options: argparse.Namespace, step: Step) -> None:
    """Do a step of a trained run, whether it is done already or not."""
    run = _open(options)
    with run.locked():
        if not run.done("train"):
            raise TrainingError(f"{run.path}: nothing is trained yet; first: llmtune train {run.path}")
        with guarded_step(run, options.step, say_safe=False):
            step(run)


def _evaluate(run: "Run") -> None:
    from llmtune.evaluation.step import evaluate

    evaluate(run)


def _merge(run: "Run") -> None:
    from llmtune.merging.step import merge

    merge(run)


def _publish(run: "Run") -> None:
    from llmtune.publishing.step import publish

    publish(run)


def _report(run: "Run") -> None:
    from llmtune.reporting.page import report

    report(run)


def _write_report(options: argparse.Namespace) -> None:
    run = _open(options)
    with run.locked():
        _report(run)
    print(run.report_file)


def _chat(options: argparse.Namespace) -> None:
    from llmtune.cli.chat import chat

    chat(_open(options))
