"""A run opened for one of its steps after training, and the step done."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtune.errors import FieldError, ProofError, RecipeError, TrainingError
from llmtune.recipe.compare import DEFINING
from llmtune.recipe.sections import Recipe
from llmtune.recipe.standing import with_absolute_config
from llmtune.recipe.suite import resolve_suite
from llmtune.run import Run, open_run
from llmtune.storage import fetch, keep_stored, run_folder
from llmtune.working import importing

Folder = Run | Path | str
Overrides = Sequence[str]


@contextlib.contextmanager
def ready_run(folder: Folder, name: str, overrides: Overrides) -> Iterator[Run]:
    """The run in a folder, locked, for one step; what ends the block becomes an error of that step."""
    from llmtune.launch.guard import guarded_step

    run = open_with(folder, overrides)
    if name == "publish" and run.recipe().publish is None:
        raise RecipeError(f"{run.recipe_file}: publish: is missing; add --set publish.repo=owner/name")
    with at_work(run):
        before = run.recipe_file.read_text(encoding="utf-8")
        if name != "report":
            require_trained(run)
        with guarded_step(run, name, say_safe=False):
            yield run
        kept = run.recipe_file.read_text(encoding="utf-8") != before
    if kept and overrides:
        print(f"from now on the run has {', '.join(overrides)}; --set changes it again")


@contextlib.contextmanager
def at_work(run: Run) -> Iterator[None]:
    """Keep other processes out of a run while the block works on it; the store that it is on, if any, is kept whole."""
    with run.locked(), keep_stored(run.path):
        yield


def require_trained(run: Run) -> None:
    """Raise TrainingError where a run has no complete delta."""
    if not run.done("train"):
        raise TrainingError(f"{run.path}: nothing is trained yet; first: llmtune train {run.path}")


def do(run: Run, name: str, **options: object) -> Any:
    """Do one step, with its options, of a run whose lock the caller holds, and keep the settings that it followed."""
    step = step_function(name)
    if name == "report":
        run.keep_settings()  # the page shows the recipe
    result = step(run, **options)
    if name != "report":
        run.keep_settings()
    return result


def step_function(name: str) -> Callable[..., Any]:
    """The function that does a step, or shows what it would do; importing it imports torch, but for the report's."""
    if name == "report":
        from llmtune.reporting import page

        return page.report
    with importing():
        if name == "eval":
            from llmtune.evaluation import step as evaluation

            return evaluation.evaluate
        if name == "merge":
            from llmtune.merging import step as merging

            return merging.merge
        if name == "export":
            from llmtune.exporting import step as exporting

            return exporting.export
        from llmtune.publishing import step as publishing

        return publishing.publish if name == "publish" else publishing.preview


def open_with(folder: Folder, overrides: Overrides) -> Run:
    """The run in a folder, with other settings for its steps; raises RecipeError for one that makes another run."""
    path = path_of(folder)
    fetch(path, must_exist=True)
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


def path_of(folder: Folder | Recipe) -> Path:
    """The folder of a run, however it is named; of a URL, the folder here in which its run is worked on."""
    if isinstance(folder, Recipe):
        return Path(str(folder))
    return folder.path if isinstance(folder, Run) else run_folder(folder)


def join(
    folders: Sequence[Folder],
    weights: Sequence[float] | None,
    how: str,
    density: float | None,
    out: Path | str | None,
    seed: int,
) -> Run:
    """The run that trained runs make together, in the folder `out`; raises RecipeError before torch is imported."""
    from llmtune.combining.request import check_request, refuse_used
    from llmtune.launch.faults import told_in_one_line

    request = check_request(len(folders), weights, how, density, seed)
    runs = [open_with(folder, ()) for folder in folders]
    for run in runs:
        require_trained(run)
    path = path_of(out or Path("runs") / "+".join(run.path.resolve().name for run in runs))
    fetch(path)
    refuse_used(path)
    with importing():
        from llmtune.combining.step import combine
    with keep_stored(path), told_in_one_line(ProofError):
        return combine(runs, request, path)
