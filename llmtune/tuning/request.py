"""What is to be tuned: a recipe, the values of its keys to search, and for how long; checked before anything trains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.errors import FieldError, RecipeError
from llmtune.recipe.compare import DEFINING, flatten
from llmtune.recipe.sections import Recipe, values
from llmtune.recipe.standing import standing
from llmtune.run import locates_mistakes
from llmtune.searching.space import Choice, Range, Value, combinations, overrides, text_of
from llmtune.tuning.over import read_space

TRIALS = 20
"""Trials where neither their number nor the minutes are given."""
_ONE_PROCESS = ("auto", "cpu", "single_gpu")
_COMPARED = ("data.eval", "data.eval_fraction", "data.test", "model.base", "model.revision")
"""Keys whose values change what a validation measures."""


@dataclass(frozen=True)
class Request:
    """A recipe, what is drawn for which of its keys, and how many trials or minutes there are."""

    recipe: Recipe
    """With absolute paths."""
    file: Path
    set: tuple[str, ...]
    space: Mapping[str, Range | Choice]
    trials: int | None
    minutes: float | None
    seed: int
    out: Path

    def facts(self) -> dict[str, Any]:
        """What makes two searches the same one: the recipe's values by key, and what is drawn."""
        known = {key: value for key, value in flatten(values(self.recipe)) if key.split(".")[0] in DEFINING}
        drawn = tuple(self.space)
        kept = {key: value for key, value in known.items() if not any(_covers(name, key) for name in drawn)}
        return {**{f"--over {key}": str(one) for key, one in self.space.items()}, **kept}

    def first(self) -> list[dict[str, Value]]:
        """The values that are tried first: the recipe's own, where they are in the space; all, where they are few."""
        known: dict[str, Any] = dict(flatten(values(self.recipe)))
        own: dict[str, Value] = {key: known[key] for key in self.space if key in known}
        has_own = len(own) == len(self.space) and all(self.space[key].holds(value) for key, value in own.items())
        every = combinations(self.space, self.trials or TRIALS) or []
        return [*([own] if has_own else []), *(one for one in every if one != own)]

    def count(self) -> int | None:
        """How many trials there are; None for as many as the minutes allow."""
        every = combinations(self.space, self.trials or TRIALS)
        return len(every) if every else self.trials

    def with_values(self, chosen: Mapping[str, Value]) -> Recipe:
        """The recipe with values, its paths absolute; raises RecipeError as loading it does."""
        return standing(Recipe.load(self.file, [*self.set, *overrides(chosen)]))


def read_request(
    recipe: Path | str,
    over: Sequence[str],
    *,
    set: Sequence[str] = (),
    trials: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    out: Path | str | None = None,
) -> Request:
    """What a command or a call says, checked; raises RecipeError, in one line, for what cannot be."""
    if trials is not None and trials < 1:
        raise RecipeError(f"--trials {trials}: at least 1 is needed")
    if minutes is not None and not minutes > 0:
        raise RecipeError(f"--minutes {minutes:g}: more than 0 are needed")
    space, file = read_space(over), Path(recipe)
    settings = Recipe.load(file, set)
    check_trainable(settings)
    for key in space:
        _check_key(key, str(space[key]))
    _check_values(file, set, space)
    limit = trials if trials or minutes else TRIALS
    folder = Path(out) if out else Path("tune") / file.stem
    return Request(standing(settings), file, tuple(set), space, limit, minutes, seed, folder)


@locates_mistakes
def check_trainable(recipe: Recipe) -> None:
    """Raise FieldError where no trial can be trained with a recipe."""
    if not recipe.data.eval and not recipe.data.eval_fraction:
        message = "trials are compared by validation loss, and there are no rows for it; try data.eval_fraction: 0.05"
        raise FieldError("data.eval", message)
    if recipe.launch.accelerate not in _ONE_PROCESS:
        raise FieldError("launch.accelerate", f"a trial trains in one process; try {', '.join(_ONE_PROCESS)}")
    if (recipe.launch.processes or 1) > 1:
        raise FieldError("launch.processes", "a trial trains in one process; try 1")


def _check_key(key: str, spec: str) -> None:
    """Raise RecipeError for a key that changes nothing of a training, or what its validation measures."""
    section = key.split(".")[0]
    if section in Recipe.model_fields and section not in (*DEFINING, "memory"):
        raise RecipeError(f"--over {key}={spec}: changes nothing of the training; try keys of method, train or data")
    if any(_covers(name, key) or _covers(key, name) for name in _COMPARED):
        message = "changes what the validation loss is measured on, so that trials could not be compared"
        raise RecipeError(f"--over {key}={spec}: {message}; try keys of method or train")


def _check_values(file: Path, set: Sequence[str], space: Mapping[str, Range | Choice]) -> None:
    """Raise RecipeError for a value at the end of a range, or in a list, that the recipe does not take."""
    first = {key: one.ends()[0] for key, one in space.items()}
    for key, one in space.items():
        for end in one.ends():
            try:
                Recipe.load(file, [*set, *overrides({**first, key: end})])
            except RecipeError as error:
                raise RecipeError(_reworded(str(error), {**first, key: end}, space)) from error


def _reworded(message: str, chosen: Mapping[str, Value], space: Mapping[str, Range | Choice]) -> str:
    """A mistake of an override as one of what `--over` says."""
    for key, value in chosen.items():
        start = f"--set {key}={text_of(value)}: "
        if message.startswith(start):
            return f"--over {key}={space[key]}: {message.removeprefix(start)}"
    return message


def _covers(name: str, key: str) -> bool:
    """Whether a dotted key is another one, or in the section that it names."""
    return key == name or key.startswith(f"{name}.")
