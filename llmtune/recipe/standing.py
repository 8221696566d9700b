"""A recipe that stands on its own: what its author wrote, with overrides, and every path absolute."""

from pathlib import Path
from typing import Any

import yaml

from llmtune.errors import FieldError
from llmtune.files import user_path
from llmtune.recipe.paths import absolute_source, exists
from llmtune.recipe.sections import Launch, Recipe
from llmtune.recipe.shorthand import is_config_file
from llmtune.recipe.suite import resolve_suite


def standing(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, which mean the same in any folder; raises RecipeError for a suite that is not."""
    model = recipe.model
    paths = {name: _absolute(getattr(model, name)) for name in ("base", "start", "merge_into") if getattr(model, name)}
    try:
        suite = resolve_suite(recipe.eval.suite)
    except FieldError as error:
        raise recipe.located(error) from error
    return recipe.model_copy(
        update={
            "model": model.model_copy(update=paths),
            "data": recipe.data.renamed(lambda _, source: absolute_source(source)),
            "eval": recipe.eval.model_copy(update={"suite": suite}),
            "launch": with_absolute_config(recipe.launch),
        }
    )


def with_absolute_config(launch: Launch) -> Launch:
    """Return a launch section that names a config of the user's own wherever it is read."""
    own = is_config_file(launch.accelerate)
    return launch.model_copy(update={"accelerate": str(Path(launch.accelerate).absolute())}) if own else launch


def written(recipe: Recipe) -> dict[str, Any]:
    """The values that a recipe's author wrote, without defaults, as plain values."""
    values: dict[str, Any] = recipe.model_dump(mode="json", exclude_unset=True)
    for section, key in (("eval", "suite"), ("launch", "accelerate")):  # set when paths are made absolute
        default = Recipe.model_fields[section].default
        if values.get(section, {}).get(key) == getattr(default, key):
            del values[section][key]
            values = {name: value for name, value in values.items() if name != section or value}
    return values


def recipe_text(recipe: Recipe, comments: list[str]) -> str:
    """A recipe's file: lines of comment, and what its author wrote."""
    head = "".join(f"# {line}\n" for line in comments)
    return head + yaml.safe_dump(written(recipe), sort_keys=False, allow_unicode=True)


def _absolute(source: object) -> str:
    return str(user_path(str(source)).absolute()) if exists(str(source)) else str(source)
