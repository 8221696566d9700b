"""compare(recipe): arms of one recipe side by side, each for its share of the minutes."""

from collections.abc import Sequence
from pathlib import Path

from llmtune.arms.record import Comparison
from llmtune.comparing.arms import read_arms
from llmtune.comparing.folder import Folder, is_comparison
from llmtune.comparing.request import Options, Request
from llmtune.errors import RecipeError
from llmtune.files import hold
from llmtune.pool.opening import check_place
from llmtune.recipe.sections import Recipe
from llmtune.storage.urls import url_of
from llmtune.working import importing


def compare(
    recipe: Path | str,
    arms: Sequence[str] = (),
    *,
    minutes: float | None = None,
    seeds: int | None = None,
    sizes: Sequence[float] | None = None,
    baselines: Sequence[str] | None = None,
    equal: str | None = None,
    out: Path | str | None = None,
    on: str = "local",
    strict: bool = False,
    set: Sequence[str] = (),
) -> Comparison:
    """Compare arms of a recipe on its held-out rows, or go on with a comparison's folder; gives what compare.json has.

    `arms` are names such as lora, or a file of arms; 30 `minutes` are shared out over all, with 2 `seeds`, at all rows,
    beside all baselines, where nothing else is said here or was said before. `equal` is minutes or epochs, `on` local,
    gpus or ray; `strict` makes an arm that cannot be an error. Raises RecipeError, MachineError, Interrupted.
    """
    options = Options(minutes, seeds, sizes, baselines, equal)
    check_place(on)
    chosen = read_arms(arms)
    settings, folder = _opened(Path(recipe), out, set)
    before = folder.request() if folder.stored() else None
    with importing():
        from llmtune.comparing.running import Running
        from llmtune.comparing.survey import check_arms, check_rows, survey, usual_arms
        from llmtune.pool.opening import open_pool
    check_rows(settings)
    wanted = chosen or (before.arms if before else usual_arms(settings))
    new = options.over(wanted, before)
    request: Request = before.joined(new, str(folder.path)) if before else new
    check_arms(settings, request.arms)
    head = survey(settings, request.arms)
    _refuse_skipped(head["skipped"], strict)
    folder.refuse_other_rows(head["files"])
    running = Running(folder, request, head, open_pool(on, folder.path), on)
    running.check()
    with hold(folder.path / ".lock", f"{folder.path}: another comparison is at work there; wait until it ends"):
        folder.write_request(settings, request, running.head(folder.head() if before else None))
        return running.run(settings)


def _opened(recipe: Path, out: Path | str | None, overrides: Sequence[str]) -> tuple[Recipe, Folder]:
    """The recipe and the folder of a comparison, new or there; raises RecipeError where they do not go together."""
    if recipe.is_dir():
        if not is_comparison(recipe):
            raise RecipeError(f"{recipe}: holds no comparison; give a recipe's file")
        if out is not None or overrides:
            option = f"--out {out}" if out is not None else f"--set {overrides[0]}"
            raise RecipeError(f"{option}: is for a recipe; {recipe} is a comparison already and goes on as it is")
        folder = Folder(recipe)
        return Recipe.load(folder.recipe_file), folder
    settings = Recipe.load(recipe, overrides)
    folder = Folder(Path(out) if out is not None else Path("compare") / recipe.stem)
    if url := url_of(folder.path):
        raise RecipeError(f"--out {url}: arms train and are kept on this machine; give a folder of it")
    if folder.stored():
        folder.refuse_other_recipe(settings)
    return settings, folder


def _refuse_skipped(skipped: dict[str, str], strict: bool) -> None:
    """Tell of arms that cannot be; raises RecipeError for the first one where the user wants all of them."""
    for name, reason in skipped.items():
        if strict:
            raise RecipeError(f"--strict: the arm {name} cannot be: {reason}")
        print(f"{name}: skipped: {reason}", flush=True)
