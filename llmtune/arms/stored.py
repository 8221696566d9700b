"""compare.json, read back: what is damaged or of another version is one line."""

import functools
from pathlib import Path
from typing import Any

from llmtune.arms.record import Comparison
from llmtune.errors import LlmtuneError, RecipeError
from llmtune.files import read_json

FILE = "compare.json"


def read_comparison(folder: Path) -> Comparison:
    """Read a comparison's folder; raises RecipeError where it holds none that this version can read."""
    file = folder / FILE
    if not file.is_file():
        raise RecipeError(f"{folder}: holds no {FILE}; llmtune compare writes it")
    try:
        value = read_json(file)
    except LlmtuneError as error:
        raise RecipeError(str(error)) from error
    return checked(value, str(file))


def checked(value: object, name: str) -> Comparison:
    """Return a value as a comparison; raises RecipeError that names the first place where it is none."""
    from pydantic import ValidationError

    try:
        comparison: Comparison = _shape().validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise RecipeError(
            f"{name}: {where}: {first['msg'].lower()}; run llmtune compare again to write it anew"
        ) from error
    _check_rows(comparison, name)
    return comparison


def _check_rows(comparison: Comparison, name: str) -> None:
    """Raise RecipeError for arms that were not asked the same rows."""
    scored = [
        (arm["name"], seed["rows"])
        for arm in (*comparison["arms"], *(one["arm"] for one in comparison["baselines"] if "arm" in one))
        for seed in arm.get("seeds", [])
    ]
    scored += [(one["name"], one["rows"]) for one in comparison["baselines"] if "rows" in one]
    counts = [
        (arm, len(values)) for arm, one in scored for values in (one["score"], one["loss"], one["tokens"]) if values
    ]
    for arm, rows in counts:
        if rows != counts[0][1]:
            raise RecipeError(f"{name}: {arm} has scores of {rows} rows, {counts[0][0]} of {counts[0][1]}")


@functools.cache
def _shape() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Comparison)
