"""The commands; everything heavy is imported inside them."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtune import __version__
from llmtune.errors import Interrupted, LlmtuneError, TrainingError
from llmtune.launch.quiet import quiet_libraries

Command = Callable[[argparse.Namespace], int | None]


def main(arguments: list[str] | None = None) -> int:
    """Run one command and give its exit code; a user's mistake is one line on stderr."""
    options = _parser().parse_args(arguments)
    quiet_libraries()
    command: Command = options.command
    try:
        return command(options) or 0
    except LlmtuneError as error:
        print(f"llmtune: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("llmtune: stopped", file=sys.stderr)
        return Interrupted.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmtune", description="Fine-tune a language model from a recipe.")
    parser.add_argument("--version", action="version", version=f"llmtune {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    init = _add(commands, "init", _init, "write a recipe for your data")
    init.add_argument(
        "--data", type=Path, metavar="FILE", help="your rows (default: the sample that ships with llmtune)"
    )
    init.add_argument("--model", metavar="ID", help="a Hub id, a folder, a .gguf file or package:NAME")
    init.add_argument("--method", metavar="M", help="full, frozen, gradual, discriminative, staged or lora")
    init.add_argument("-o", dest="out", type=Path, default=Path("recipe.yaml"), help="where to write it (recipe.yaml)")

    for name, command, text in (
        ("check", _check, "validate recipe and data and print what will be learned; nothing trains"),
        ("plan", _plan, "print what trains when, at which rate"),
        ("run", _run, "check, train, evaluate, merge, publish as the recipe says; or go on with a run folder"),
    ):
        one = _add(commands, name, command, text)
        one.add_argument("recipe", type=Path, metavar="RECIPE")
        one.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a value of the recipe")
        if name == "run":
            one.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (runs/<recipe's name>)")
            one.add_argument("--overwrite", action="store_true", help="remove the run that the folder holds")
        else:
            one.add_argument("--json", action="store_true", help="print JSON")

    for name, step, text in (
        ("train", _train, "train, from the newest checkpoint"),
        ("eval", lambda options: _again(options, _evaluate), "evaluate base and tuned model"),
        ("merge", lambda options: _again(options, _merge_run), "write base + delta as full weights, with proof"),
        ("publish", lambda options: _again(options, _publish_run), "upload to the Hub as the recipe says"),
        ("report", _report, "write the report page"),
        ("chat", _chat, "talk to base and tuned side by side"),
    ):
        _add(commands, name, step, text).add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    _add(commands, "schema", _schema, "print the recipe's JSON schema, for editors")
    return parser


def _add(commands: Any, name: str, command: Command, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=command)
    return parser


def _init(options: argparse.Namespace) -> None:
    from llmtune.init import write_recipe

    written = write_recipe(options.data, options.model, options.method, options.out)
    print(f"wrote {written}; next: llmtune check {written}")


def _schema(options: argparse.Namespace) -> None:
    from llmtune.recipe.sections import schema

    print(json.dumps(schema(), indent=2))


def _check(options: argparse.Namespace) -> None:
    from llmtune import recipe

    settings = recipe.load(options.recipe, options.set)
    from llmtune.launch.command import count_gpus
    from llmtune.terminal import findings, plan
    from llmtune.train.prepare import examine

    checked, table = examine(settings, count_gpus())
    if options.json:
        print(json.dumps({"data": checked.findings, "plan": table}, indent=2, ensure_ascii=False))
    else:
        findings(checked.findings)
        plan(table)


def _plan(options: argparse.Namespace) -> None:
    from llmtune import recipe

    settings = recipe.load(options.recipe, options.set)
    from llmtune.launch.command import count_gpus
    from llmtune.terminal import plan
    from llmtune.train.prepare import plan_alone

    table = plan_alone(settings, count_gpus())
    if options.json:
        print(json.dumps(table, indent=2))
    else:
        plan(table)


def _run(options: argparse.Namespace) -> None:
    from llmtune import recipe
    from llmtune.launch.command import count_gpus, runs_one
    from llmtune.launch.process import train_in_children
    from llmtune.run import Run, open_run

    if options.recipe.is_dir():
        _finish(open_run(options.recipe))
        return
    settings = recipe.load(options.recipe, options.set)
    made = Run(options.out or Path("runs") / options.recipe.stem)
    if settings.publish:
        from llmtune.publish.step import preflight

        preflight(settings)
    with made.locked():
        if runs_one(settings):
            # It prepares the run as well: to import torch in two processes, one after the other, takes its time.
            words = [str(options.recipe), *(f"--set={one}" for one in options.set), f"--out={made.path}"]
            train_in_children(settings, made, [*words, *(["--overwrite"] if options.overwrite else [])])
        else:
            from llmtune.terminal import prepared
            from llmtune.train import prepare as prepare_module

            prepared(prepare_module.prepare(settings, made.path, count_gpus(), options.overwrite))
    _finish(made)


def _finish(made: Any) -> None:
    """Every step that the recipe asks for and that is not done yet, in order."""
    from llmtune.launch.process import train_in_children
    from llmtune.terminal import summary

    settings = made.recipe()
    with made.locked():
        if not made.done("train"):
            train_in_children(settings, made, [str(made.path)])
        if settings.eval.suite != "none" and not made.done("eval"):
            _step(made, "eval", _evaluate)
        if settings.merge.enabled and not made.done("merge"):
            _step(made, "merge", _merge_run)
        if settings.publish and not made.done("publish"):
            _step(made, "publish", _publish_run)
        _step(made, "report", _report_run)
    summary(made)


def _step(made: Any, name: str, step: Callable[[Any], object]) -> None:
    """A step after training; whatever ends it, say that the delta is safe and how to go on."""
    from llmtune.terminal import heading

    heading(name)
    try:
        step(made)
    except LlmtuneError:
        print(
            f"llmtune: what was trained is safe in {made.delta}; finish with: llmtune run {made.path}", file=sys.stderr
        )
        raise


def _open(options: argparse.Namespace) -> Any:
    from llmtune.run import open_run

    return open_run(options.run)


def _train(options: argparse.Namespace) -> None:
    from llmtune.launch.process import train_in_children

    made = _open(options)
    with made.locked():
        if made.done("train"):
            made.forget("train")
            shutil.rmtree(made.checkpoints, ignore_errors=True)
        train_in_children(made.recipe(), made, [str(made.path)])


def _again(options: argparse.Namespace, step: Callable[[Any], object]) -> None:
    made = _open(options)
    with made.locked():
        if not made.done("train"):
            raise TrainingError(f"{made.path}: nothing is trained yet; first: llmtune train {made.path}")
        step(made)


def _evaluate(made: Any) -> None:
    from llmtune.evaluate.step import evaluate

    evaluate(made)


def _merge_run(made: Any) -> None:
    from llmtune.merge.step import merge

    merge(made)


def _publish_run(made: Any) -> None:
    from llmtune.publish.step import publish

    publish(made)


def _report_run(made: Any) -> None:
    from llmtune.report.page import report

    report(made)


def _report(options: argparse.Namespace) -> None:
    made = _open(options)
    with made.locked():
        _report_run(made)
    print(made.report_file)


def _chat(options: argparse.Namespace) -> None:
    from llmtune.chat import chat

    chat(_open(options))
