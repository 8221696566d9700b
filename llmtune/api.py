"""The Python API, which the command line uses too: train, evaluate, merge, publish and report."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.errors import FieldError, Interrupted, LlmtuneError, RecipeError, TrainingError
from llmtune.files import write_text
from llmtune.launch.command import with_absolute_config
from llmtune.machine.gpus import count_gpus
from llmtune.recipe.compare import DEFINING
from llmtune.recipe.sections import Recipe
from llmtune.recipe.suite import resolve_suite
from llmtune.run import Run, open_run
from llmtune.working import importing

if TYPE_CHECKING:
    from llmtune.evaluation.results import Evaluations

__all__ = ["Recipe", "evaluate", "merge", "publish", "report", "train"]

Folder = Run | Path | str
Overrides = Sequence[str]


def train(
    recipe: Recipe | Folder, out: Path | str | None = None, *, overwrite: bool = False, set: Overrides = ()
) -> Run:
    """Train a recipe in the run folder `out`, or go on with the run in a folder, in child processes; gives the run.

    A run that is trained already is left as it is, unless `overwrite`. Raises LlmtuneError for what ends it early.
    """
    job = begin(recipe, out, overwrite=overwrite, set=set)
    with job.run.locked():
        job.train()
    return Run(job.run.path)


def evaluate(run: Folder, *, set: Overrides = ()) -> "Evaluations":
    """Evaluate base and tuned model of a trained run; gives what eval/ holds. Raises ProofError, RecipeError."""
    with _ready(run, "eval", set) as ready:
        return do(ready, "eval")


def merge(run: Folder, *, set: Overrides = ()) -> dict[str, Any]:
    """Write full weights to the run's merged/ and prove them; gives the proof's facts. Raises ProofError."""
    with _ready(run, "merge", set) as ready:
        return do(ready, "merge")


def publish(run: Folder, *, set: Overrides = (), dry_run: bool = False) -> dict[str, Any]:
    """Upload what the run's recipe says to the Hub; gives where it is. Raises PublishError.

    With `dry_run` nothing is sent: what would go, but the weights, lies in the run's publish/; gives the files' sizes.
    """
    with _ready(run, "publish", set) as ready:
        return _function("preview")(ready) if dry_run else do(ready, "publish")


def report(run: Folder, *, set: Overrides = ()) -> Path:
    """Write the page on what the run has done so far; gives its path."""
    with _ready(run, "report", set) as ready:
        return do(ready, "report")


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
        if self.overwrite and not self.is_new:
            self.run.forget("train")
            shutil.rmtree(self.run.checkpoints, ignore_errors=True)
        with _kept(self.run):
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
    if isinstance(recipe, Run) or (not isinstance(recipe, Recipe) and Path(recipe).is_dir()):
        if out is not None:
            raise RecipeError(f"--out {out}: is for a recipe; {_path(recipe)} is a run already and stays where it is")
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
    return Job(Run(Path(out or Path("runs") / Path(settings.file or "").stem)), settings, overwrite, is_new=True)


def complete(job: Job, heading: Callable[[str], None]) -> Run:
    """Take a run through every step that its recipe asks for and that is not done yet, each after its heading."""
    settings = job.settings
    if settings.publish and job.is_new:
        with importing():
            from llmtune.publishing.step import preflight

        preflight(settings)
    with job.run.locked():
        job.train()
        run = Run(job.run.path, job.run.settings)
        wanted = {"eval": settings.eval.suite != "none", "merge": settings.merge.enabled, "publish": settings.publish}
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


@contextlib.contextmanager
def _ready(folder: Folder, name: str, overrides: Overrides) -> Iterator[Run]:
    """The run in a folder, locked, for one step; what ends the block becomes an error of that step."""
    from llmtune.launch.guard import guarded_step

    run = open_with(folder, overrides)
    if name == "publish" and run.recipe().publish is None:
        raise RecipeError(f"{run.recipe_file}: publish: is missing; add --set publish.repo=owner/name")
    with run.locked():
        if name != "report":
            require_trained(run)
        with guarded_step(run, name, say_safe=False):
            yield run


def require_trained(run: Run) -> None:
    """Raise TrainingError where a run has no complete delta."""
    if not run.done("train"):
        raise TrainingError(f"{run.path}: nothing is trained yet; first: llmtune train {run.path}")


def do(run: Run, name: str) -> Any:
    """Do one step of a run whose lock the caller holds, and keep the settings that it followed."""
    step = _function(name)
    if name == "report":
        run.keep_settings()  # the page shows the recipe
    result = step(run)
    if name != "report":
        run.keep_settings()
    return result


def _function(name: str) -> Callable[[Run], Any]:
    """The function that does a step, or shows what it would do; importing it imports torch, but for the report's."""
    with importing():
        if name == "eval":
            from llmtune.evaluation import step as evaluation

            return evaluation.evaluate
        if name == "merge":
            from llmtune.merging import step as merging

            return merging.merge
        if name in ("publish", "preview"):
            from llmtune.publishing import step as publishing

            return publishing.publish if name == "publish" else publishing.preview
        from llmtune.reporting import page

        return page.report


def open_with(folder: Folder, overrides: Overrides) -> Run:
    """The run in a folder, with other settings for its steps; raises RecipeError for one that makes another run."""
    path = _path(folder)
    run = open_run(path)
    for override in overrides:
        section = override.partition("=")[0].partition(".")[0]
        if section in DEFINING:
            message = f"{section} is part of what the run in {path} is; that is another run"
            raise RecipeError(f"--set {override}: {message}: llmtune run RECIPE --set {override} --out OTHER")
    if not overrides:
        run.recipe()  # a mistake in it is told before torch is imported
        return run
    settings = Recipe.load(run.recipe_file, overrides)
    settings = settings.model_copy(update={"launch": with_absolute_config(settings.launch)})
    if any(override.startswith("eval") for override in overrides):
        try:
            suite = resolve_suite(settings.eval.suite)
        except FieldError as error:
            raise settings.located(error) from error
        settings = settings.model_copy(update={"eval": settings.eval.model_copy(update={"suite": suite})})
    return replace(run, settings=settings)


def _path(folder: Folder | Recipe) -> Path:
    return folder.path if isinstance(folder, Run) else Path(str(folder))


@contextlib.contextmanager
def _kept(run: Run) -> Iterator[None]:
    """Give child processes a run's other settings through its recipe; an error puts the old ones back."""
    before = run.recipe_file.read_text(encoding="utf-8")
    run.keep_settings()
    try:
        yield
    except LlmtuneError as error:
        if not isinstance(error, Interrupted):
            write_text(run.recipe_file, before)
        raise
