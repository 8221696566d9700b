"""One process of a training, by the words of its command line."""

import argparse
from pathlib import Path

import torch
from accelerate.utils import gather_object

from llmtune import terminal
from llmtune.errors import Interrupted, LlmtuneError
from llmtune.launch.process import report_failure
from llmtune.recipe import load as load_recipe
from llmtune.run import open_run
from llmtune.training.distributed import join_processes
from llmtune.training.loop import train
from llmtune.training.prepare import prepare_all


def main(words: list[str]) -> int:
    """Train the run folder, or the recipe, that the words of a command line name; gives the exit code."""
    options = _parser().parse_args(words)
    try:
        if options.recipe.is_dir():
            train(open_run(options.recipe))
        else:
            _train_recipe(options)
    except LlmtuneError as error:
        return report_failure(error)
    except KeyboardInterrupt:
        return Interrupted.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="accelerate launch --config_file FILE -m llmtune.train")
    parser.add_argument("recipe", type=Path, metavar="RECIPE|RUN")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a value of the recipe")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (runs/<recipe's name>)")
    parser.add_argument("--overwrite", action="store_true", help="remove the run that the folder holds")
    return parser


def _train_recipe(options: argparse.Namespace) -> None:
    """Train the run that the first process on each machine makes of a recipe, unless it is trained already."""
    state = join_processes()
    out, ready, failure = options.out or Path("runs") / options.recipe.stem, None, None
    if state.is_local_main_process:
        try:
            recipe = load_recipe(options.recipe, options.set)
            ready = prepare_all(recipe, out, torch.cuda.device_count(), options.overwrite)
        except LlmtuneError as error:
            failure = error
    _raise_in_every_process(failure)
    run = open_run(out)
    if state.is_main_process:
        terminal.prepared(run)
    if run.done("train"):
        state.destroy_process_group()
    else:
        train(run, ready)


def _raise_in_every_process(failure: LlmtuneError | None) -> None:
    """Wait for all processes and raise the first failure among them, if there is one, in each."""
    # A process that waits for one that is gone would print a traceback over the one line that says what is wrong.
    answers = gather_object([(str(failure), failure.exit_code) if failure else None])
    for message, code in filter(None, answers):
        error = LlmtuneError(message)
        error.exit_code = code
        raise error
