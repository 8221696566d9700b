"""The command line from its words to an exit code: help, usage errors, mistakes in one line, shell completion."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from llmtune import __version__
from llmtune.cli.catalog import COMMANDS, PANELS
from llmtune.cli.options import Verbose
from llmtune.errors import LONGEST_MESSAGE, LlmtuneError, nearest, one_line
from llmtune.launch.faults import VERBOSE
from llmtune.launch.guard import run_command
from llmtune.launch.quiet import is_verbose, quiet_libraries
from llmtune.launch.streams import outlive_readers
from llmtune.working import own_process

UsageError: Any = typer.BadParameter.__base__
_COMPLETE = "_LLMTUNE_COMPLETE"
"""Set by a shell that asks for completions."""
_ELSEWHERE = {
    "help": "--help",
    "version": "--version",
    **dict.fromkeys(("finetune", "fine-tune", "sft", "fit", "start"), "run"),
    **dict.fromkeys(("preprocess", "validate"), "check"),
    **dict.fromkeys(("test", "benchmark"), "eval"),
    **dict.fromkeys(("merge-lora", "merge_lora"), "merge"),
    **dict.fromkeys(("convert", "gguf", "quantize"), "export"),
    **dict.fromkeys(("push", "upload"), "publish"),
    **dict.fromkeys(("inference", "generate", "predict"), "infer"),
    **dict.fromkeys(("list", "examples", "fetch"), "recipes"),
}
"""What users of other tools type, and the command that does it."""
_INTRODUCTION = """Fine-tune a language model from a recipe.

A first run on your own data: llmtune init rows.jsonl, then llmtune check recipe.yaml, then llmtune run recipe.yaml."""


class Group(TyperGroup):
    """The commands; an unknown one is answered with the nearest."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the first word names; raises a usage error."""
        word = args[0]
        if self.get_command(ctx, word) is None and not word.startswith("-"):
            is_file = Path(word).exists() or word.endswith((".yaml", ".yml"))
            usual = f"; here it is 'llmtune {_ELSEWHERE[word]}'" if word in _ELSEWHERE else ""
            close = usual or nearest(word, list(self.commands))
            hint = f"; did you mean 'llmtune run {word}'?" if is_file else close
            ctx.fail(f"there is no command {word!r}{hint}")
        return super().resolve_command(ctx, args)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"llmtune {__version__}")
        raise typer.Exit


def _llmtune(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", callback=_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    verbose: Verbose = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def build() -> typer.Typer:
    """Build the application, with every command in its panel of the help."""
    app = typer.Typer(
        name="llmtune",
        cls=Group,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True, help=_INTRODUCTION)(_llmtune)
    for command in COMMANDS:
        examples = "\n\n".join(["[bold]Examples[/bold]", *command.examples])
        app.command(
            command.name,
            cls=command.parser,
            help=command.text,
            epilog=examples,
            rich_help_panel=PANELS[command.panel],
        )(command.function)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a user's mistake is one line on stderr.

    Without `arguments`, this process is that command alone, with the words that it was started with.
    """
    if arguments is None:
        own_process()
        outlive_readers()
    app = build()
    if arguments is None and _COMPLETE in os.environ:
        typer.main.get_command(app).main(prog_name="llmtune")
    words = list(sys.argv[1:] if arguments is None else arguments)
    with _verbose("--verbose" in words) as verbose:
        if not verbose:
            quiet_libraries()
        return run_command(lambda: _run(app, words, verbose))


def _run(app: typer.Typer, words: list[str], verbose: bool) -> int:
    """Run the command that the words name and return its exit code; raises what ends it but a usage error."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("llmtune", words) as context:
            return int(command.invoke(context) or 0)
    except typer.Exit as end:
        return int(end.exit_code)
    except UsageError as error:
        return _refuse(error)
    except LlmtuneError:
        if verbose:
            traceback.print_exc()
        raise


def _refuse(error: Any) -> int:
    """Print a usage error in one line, with the nearest option, and where the help is."""
    option, possible = getattr(error, "option_name", None), getattr(error, "possibilities", None)
    context = getattr(error, "ctx", None)
    hint = f"; did you mean {possible[0]}?" if possible else _usual(str(option), context) if option else ""
    message = f"no such option: {option}" if option and possible is not None else error.format_message()
    message = " ".join(f"{message[:1].lower()}{message[1:].rstrip('.')}{hint}".split())
    see = f" (see: {context.command_path} --help)" if context is not None else ""
    print(f"llmtune: {one_line(message, LONGEST_MESSAGE)}{see}", file=sys.stderr)
    return 2


def _usual(option: str, context: typer.Context | None) -> str:
    """Where the value goes that users of other tools give in an option of its own; "" for an option of another kind."""
    takes = {name for parameter in context.command.params for name in parameter.opts} if context else set()
    if context and option in ("--config", "-c", "--recipe") and "recipe" in takes:
        return f"; give the file as it is: {context.command_path} RECIPE"
    return "; a recipe's value is set by --set section.key=value" if "--set" in takes else ""


@contextlib.contextmanager
def _verbose(wanted: bool) -> Iterator[bool]:
    """Tell this process and its children to hide nothing while a command runs; gives whether they do."""
    before = os.environ.get(VERBOSE)
    if wanted:
        os.environ[VERBOSE] = "1"
    try:
        yield is_verbose()
    finally:
        if wanted:
            os.environ.pop(VERBOSE)
            os.environ.update({VERBOSE: before} if before is not None else {})
