"""One process of a training, by the words of its command line."""

import argparse
import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from llmtune import terminal
from llmtune.errors import Interrupted, LlmtuneError, TrainingError
from llmtune.launch.ending import less_memory, resume_words
from llmtune.launch.faults import told_in_one_line
from llmtune.launch.process import EXIT_FILE, report_failure
from llmtune.machine import processes
from llmtune.recipe import load as load_recipe
from llmtune.run import Run, open_run
from llmtune.training.distributed import join_processes
from llmtune.training.loop import train
from llmtune.training.prepare import complete, prepare_all


def main(words: list[str]) -> int:
    """Train the run folder, or the recipe, that the words of a command line name; gives the exit code."""
    options = _parser().parse_args(words)
    is_run = options.recipe.is_dir()
    run = Run(options.recipe if is_run else options.out or Path("runs") / options.recipe.stem)
    try:
        with told_in_one_line(TrainingError, run.path, partial(resume_words, run), partial(_less_memory, run)):
            train_run = _train_folder if is_run else _train_recipe
            train_run(options, run)
    except LlmtuneError as error:
        return report_failure(error)
    except KeyboardInterrupt:
        return Interrupted.exit_code
    return 0


def _less_memory(run: Run) -> str:
    return less_memory(run.recipe()) if run.recipe_file.is_file() else ""


@contextlib.contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Keep other trainings out of the run for as long as its first process lives; raises in every process."""
    with contextlib.ExitStack() as locks:
        failure = None
        if join_processes().is_main_process:
            try:
                if EXIT_FILE not in os.environ:  # else the command that started this process keeps others out
                    locks.enter_context(run.locked())
                locks.enter_context(run.training())
            except LlmtuneError as error:
                failure = error
        _raise_in_every_process(failure)
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="accelerate launch --config_file FILE -m llmtune.train")
    parser.add_argument("recipe", type=Path, metavar="RECIPE|RUN")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a value of the recipe")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (runs/<recipe's name>)")
    parser.add_argument("--overwrite", action="store_true", help="remove the run that the folder holds")
    return parser


def _train_folder(options: argparse.Namespace, folder: Run) -> None:
    """Train the run in a folder, which is completed where what made it was killed on the way."""
    run = open_run(folder.path)
    with _alone(run):
        with _first_on_each_machine(run) as here:
            if here:
                complete(run, torch.cuda.device_count())
        train(run)


def _train_recipe(options: argparse.Namespace, run: Run) -> None:
    """Train the run that the first process on each machine makes of a recipe, unless it is trained already."""
    state, ready = join_processes(), None
    with _alone(run):
        with _first_on_each_machine(run) as here:
            if here:
                recipe = load_recipe(options.recipe, options.set)
                ready = prepare_all(recipe, run.path, torch.cuda.device_count(), options.overwrite)
        open_run(run.path)
        if state.is_main_process:
            terminal.prepared(run)
        if run.done("train"):
            state.destroy_process_group()
        else:
            train(run, ready)


@contextlib.contextmanager
def _first_on_each_machine(run: Run) -> Iterator[bool]:
    """Whether this is the first process on its machine; all wait for those, and get the first error among them."""
    failure = None
    try:
        with told_in_one_line(LlmtuneError, run.path):
            yield join_processes().is_local_main_process
    except LlmtuneError as error:
        failure = error
    _raise_in_every_process(failure)


def _raise_in_every_process(failure: LlmtuneError | None) -> None:
    """Wait for all processes and raise the first failure among them, if there is one, in each."""
    # A process that waits for one that is gone would print a traceback over the one line that says what is wrong.
    answers = processes.gather((str(failure), failure.exit_code) if failure else None)
    for message, code in filter(None, answers):
        error = LlmtuneError(message)
        error.exit_code = code
        raise error
