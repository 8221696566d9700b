"""What a user asks of a combination: weights, and how deltas are joined; mistakes are told before torch loads."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtune.errors import RecipeError, nearest
from llmtune.run.folder import UNOWNED
from llmtune.storage import stored_at

HOW = {"linear": "the weighted sum", "ties": "TIES", "dare": "DARE"}
"""The ways to join deltas, and what people call them."""
DENSITY = 0.5
"""The share of values that ties and dare keep where nothing else is said."""


@dataclass(frozen=True)
class Request:
    """How deltas are joined, each with its weight."""

    weights: tuple[float, ...]
    how: str
    density: float | None
    """The share of each delta's values that stays; None for linear, which keeps all."""
    seed: int | None
    """The seed of what dare drops; None for the others, which drop nothing at random."""


def check_request(
    runs: int, weights: Sequence[float] | None, how: str, density: float | None, seed: int = 0
) -> Request:
    """The request of a user for so many runs; without weights each counts the same. Raises RecipeError."""
    if runs < 2:
        raise RecipeError("combine: needs two runs or more, as in: llmtune combine runs/a runs/b --weights 0.7 0.3")
    if how not in HOW:
        raise RecipeError(f"--how {how}: is unknown; try {', '.join(HOW)}{nearest(how, list(HOW))}")
    shares = tuple(weights) if weights else (1 / runs,) * runs
    if len(shares) != runs:
        raise RecipeError(f"--weights: {len(shares)} for {runs} runs; give one for each, in the order of the runs")
    if odd := [weight for weight in shares if not math.isfinite(weight)]:
        raise RecipeError(f"--weights {odd[0]}: is not a finite number")
    if not any(shares):
        raise RecipeError("--weights: are all 0, which gives the base itself; give one that is not")
    return Request(shares, how, _density(how, density), seed if how == "dare" else None)


def _density(how: str, density: float | None) -> float | None:
    if how == "linear":
        if density is not None:
            raise RecipeError(f"--density {density}: is for --how ties and dare; linear keeps every value")
        return None
    share = DENSITY if density is None else density
    if not 0 < share <= 1:
        raise RecipeError(f"--density {share}: should be above 0 and at most 1, the share of values that stays")
    return share


def refuse_used(out: Path) -> None:
    """Raise RecipeError for a file, or a folder that holds more than the locks of a run that never began."""
    if out.exists() and not out.is_dir():
        raise RecipeError(f"{out}: is a file; choose a folder with --out")
    files = sorted(file.name for file in out.iterdir() if file.name not in UNOWNED) if out.is_dir() else []
    if files:
        what = "holds a run already" if "recipe.yaml" in files else f"is not empty ({files[0]})"
        raise RecipeError(f"{stored_at(out) or out}: {what}; choose another with --out")
