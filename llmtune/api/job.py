"""A training, in child processes, and every step after it that its recipe asks for."""

import shutil
from collections.abc import Callable
from pathlib import Path

from llmtune.api.steps import Folder, Overrides, at_work, do, open_with, path_of
from llmtune.errors import RecipeError
from llmtune.machine.gpus import count_gpus
from llmtune.recipe.sections import Recipe
from llmtune.run import Run, kept_for_children, refuse_combined
from llmtune.storage import fetch, stored_at
from llmtune.working import importing


class Job:
    """A training that is about to start: the run, and what its child processes are told."""

    def __init__(self, run: Run, settings: Recipe, overwrite: bool, is_new: bool) -> None:
        self.run, self.settings, self.overwrite, self.is_new = run, settings, overwrite, is_new

    def train(self) -> None:
        """Train in child processes; the caller holds the run's lock."""
        if not self.is_new:
            self._continue()
        elif self.settings.file:
            # The child prepares the run too: preparing here would import torch in two processes, one after the other.
            words = [f"--set={override}" for override in self.settings.overrides]
            options = [f"--out={self.run.path}", *(["--overwrite"] if self.overwrite else [])]
            self._start([str(self.settings.file), *words, *options])
        else:
            self._prepare()
            self._continue()

    def _start(self, arguments: list[str]) -> None:
        from llmtune.launch.process import train_in_children

        settings = self.settings
        if settings.launch.is_open and count_gpus() > 1:
            with importing():
                from llmtune.training.prepare import choose_launch
            settings = choose_launch(settings, count_gpus())
        train_in_children(settings, self.run, arguments)

    def _continue(self) -> None:
        trains = self.overwrite or not self.run.done("train")
        if trains and not self.is_new:
            refuse_combined(self.run)
        if self.overwrite and not self.is_new:
            self.run.forget("train")
            shutil.rmtree(self.run.checkpoints, ignore_errors=True)
        elif not self.run.done("train"):
            _check_scored_rows(self.run, self.settings)
        with kept_for_children(self.run):
            if not self.run.done("train"):
                self._start([str(self.run.path)])

    def _prepare(self) -> None:
        from llmtune import terminal
        from llmtune.training.prepare import prepare

        terminal.prepared(prepare(self.settings, self.run.path, count_gpus(), self.overwrite))


def begin(
    recipe: Recipe | Folder, out: Path | str | None = None, *, overwrite: bool = False, set: Overrides = ()
) -> Job:
    """The training of a recipe, of a recipe's file, or of a run's folder; raises RecipeError for what fits none."""
    if isinstance(recipe, Run) or (not isinstance(recipe, Recipe) and is_run(recipe)):
        if out is not None:
            raise RecipeError(f"--out {out}: is for a recipe; {path_of(recipe)} is a run already and stays where it is")
        run = open_with(recipe, set)
        return Job(run, run.recipe(), overwrite, is_new=False)
    if not isinstance(recipe, Recipe):
        settings = Recipe.load(recipe, set)
    elif set:
        raise RecipeError("set: is for a file or a run's folder; give overrides to Recipe.load")
    else:
        settings = recipe
    if out is None and settings.file is None:
        raise RecipeError("out: a recipe without a file needs the run's folder, as in train(recipe, 'runs/mine')")
    folder = path_of(out or Path("runs") / Path(settings.file or "").stem)
    fetch(folder)
    return Job(Run(folder), settings, overwrite, is_new=True)


def is_run(place: Path | str) -> bool:
    """Whether a run is named, and not a recipe; a folder here belongs to a URL, whatever is in it so far."""
    folder = path_of(place)
    return folder.is_dir() or stored_at(folder) is not None


def complete(job: Job, heading: Callable[[str], None]) -> Run:
    """Take a run through every step that its recipe asks for and that is not done yet, each after its heading."""
    settings = job.settings
    if settings.publish and job.is_new:
        with importing():
            from llmtune.publishing.step import preflight

        preflight(settings)
    with at_work(job.run):
        job.train()
        run = Run(job.run.path, job.run.settings)
        wanted = {"eval": settings.eval.suite != "none", "merge": settings.merge.enabled, "publish": settings.publish}
        if settings.eval.backend == "vllm":  # it may ask the merged weights
            wanted = {"merge": wanted.pop("merge"), **wanted}
        for name in (name for name, is_wanted in wanted.items() if is_wanted and not run.done(name)):
            _finish(run, name, heading)
        _finish(run, "report", heading)
    return Run(run.path)


def _finish(run: Run, name: str, heading: Callable[[str], None]) -> None:
    """Do a step after training; whatever ends it, say that the delta is safe and how to continue."""
    from llmtune.launch.guard import guarded_step

    heading(name)
    with guarded_step(run, name):
        do(run, name)


def _check_scored_rows(run: Run, settings: Recipe) -> None:
    """Raise RecipeError where checkpoints that are there were scored on another number of rows than the next will."""
    before = Run(run.path).recipe().eval.rows
    if settings.train.keep_best == "score" and settings.eval.rows != before and any(run.checkpoints.glob("step-*")):
        message = f"the checkpoints in {run.path} were scored on {before} rows, and scores on {settings.eval.rows}"
        raise RecipeError(f"eval.rows: {message} cannot be compared; keep {before}, or add --overwrite to train again")
