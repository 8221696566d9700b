"""One process of a training, by the words of its command line."""

import argparse
import contextlib
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from llmtune import terminal
from llmtune.errors import Interrupted, LlmtuneError, MachineError, RecipeError, TrainingError
from llmtune.launch.ending import less_memory, resume_words
from llmtune.launch.faults import told_in_one_line
from llmtune.launch.process import EXIT_FILE, report_failure
from llmtune.machine import processes
from llmtune.machine.gpus import count_gpus
from llmtune.model.files.locate import locate_base
from llmtune.recipe import load as load_recipe
from llmtune.run import Run, open_run
from llmtune.storage import url_of
from llmtune.training.distributed import join_processes
from llmtune.training.loop import train
from llmtune.training.prepare import complete, prepare_all

_DELAY = 20.0
"""Seconds that a network disk may take to show another machine's files."""


def main(words: list[str]) -> int:
    """Train the run folder, or the recipe, that the words of a command line name; gives the exit code."""
    options = _parser().parse_args(words)
    for url in filter(None, (url_of(place) for place in (options.recipe, options.out) if place)):
        return report_failure(
            RecipeError(f"{url}: is for `llmtune run`; by hand, give a folder that all machines share")
        )
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
        with _failing_together(run):
            if join_processes().is_main_process:
                if EXIT_FILE not in os.environ:  # else the command that started this process keeps others out
                    locks.enter_context(run.locked())
                locks.enter_context(run.training())
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
    run = _open_everywhere(folder)
    with _alone(run):
        with _failing_together(run):
            if join_processes().is_main_process:
                complete(run, count_gpus())
        _fetch_base(run)
        train(run)


def _train_recipe(options: argparse.Namespace, run: Run) -> None:
    """Train the run that the first of all processes makes of a recipe, unless it is trained already."""
    state, ready = join_processes(), None
    with _alone(run):
        with _failing_together(run):
            if state.is_main_process:
                recipe = load_recipe(options.recipe, options.set)
                ready = prepare_all(recipe, run.path, count_gpus(), options.overwrite)
        _open_everywhere(run)
        if state.is_main_process:
            terminal.prepared(run)
        if run.done("train"):
            state.destroy_process_group()
        else:
            _fetch_base(run)
            train(run, ready)


def _open_everywhere(folder: Run) -> Run:
    """The run in a folder; raises in every process where one of them does not find it."""
    first = join_processes().is_main_process
    with _failing_together(folder):
        _await(folder.recipe_file)
        if not (first or folder.recipe_file.is_file()):
            message = "the first process has the run there, and another machine does not"
            raise MachineError(f"{folder.path}: {message}; give a folder on a disk that all machines share, with --out")
        return open_run(folder.path)


def _await(file: Path) -> None:
    """Wait for what another machine wrote: a network disk may show it seconds later."""
    end = time.monotonic() + (_DELAY if os.environ.get("GROUP_RANK", "0") != "0" else 0)
    while not file.is_file() and time.monotonic() < end:
        time.sleep(0.2)


def _fetch_base(run: Run) -> None:
    """Bring the base onto each other machine by one process of it; the others there find it."""
    state = join_processes()
    with _failing_together(run):
        if state.is_local_main_process and not state.is_main_process:
            locate_base(run.recipe().model)


@contextlib.contextmanager
def _failing_together(run: Run) -> Iterator[None]:
    """Run a block in all processes; what ends it in any is raised in each, once all have come to its end."""
    failure = None
    try:
        with told_in_one_line(LlmtuneError, run.path):
            yield
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
