"""Opens the folder of a run, or makes it."""

from pathlib import Path

from llmtune import recipe
from llmtune.errors import RecipeError
from llmtune.files import delete
from llmtune.recipe.compare import difference
from llmtune.run.folder import HEADER, UNOWNED, Run, partials, refuse_combined, refuse_file


def open_run(path: Path) -> Run:
    """The run in an existing folder; raises RecipeError where there is none."""
    run = Run(path)
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        usual = Path("runs") / path.stem
        raise RecipeError(f"{path}: is a recipe; give the folder of its run, such as {usual}")
    if not run.recipe_file.is_file():
        raise RecipeError(f"{path}: holds no run (no recipe.yaml); give the folder that `llmtune run` wrote")
    return run


def create(resolved: recipe.Recipe, path: Path, overwrite: bool = False) -> Run:
    """The run folder for a resolved recipe: new, or that of the same run, which takes the recipe's other settings.

    Raises RecipeError for a folder that holds another run, or something else.
    """
    run = Run(path, resolved)
    refuse_file(path)
    unowned = [*partials(path), *(path / name for name in UNOWNED)]
    files = sorted(file for file in path.iterdir() if file not in unowned) if path.is_dir() else []
    if files and not _holds_run(run):
        raise RecipeError(f"{path}: is not empty and holds no run ({files[0].name}); choose another with --out")
    if files and overwrite:
        for file in sorted(files, key=run.recipe_file.__eq__):  # last, as it marks the folder as a run's
            delete(file)
    elif files:
        refuse_combined(run)
        change = difference(recipe.load(run.recipe_file), resolved)
        if change:
            raise RecipeError(f"{path}: holds another run ({change}); choose another with --out, or --overwrite it")
    run.keep_settings()
    return Run(path)


def _holds_run(run: Run) -> bool:
    """Whether `create` wrote the folder's recipe.yaml: --overwrite must not empty a user's own folder."""
    return run.recipe_file.is_file() and run.recipe_file.read_bytes().startswith(HEADER.encode())
