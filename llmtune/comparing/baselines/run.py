"""Runs the baselines that a comparison lacks; scratch is made here and trained like an arm."""

import time

from llmtune.arms.arm import Arm
from llmtune.arms.record import Baseline
from llmtune.arms.tf_idf import score_tf_idf
from llmtune.comparing.baselines.scratch import scratch_arm
from llmtune.comparing.folder import SETTINGS, Folder
from llmtune.errors import LlmtuneError
from llmtune.recipe.sections import Recipe
from llmtune.training.bases.base import locate


def run_missing(folder: Folder, settings: Recipe) -> Arm | None:
    """Run what is asked for and not there; gives the arm that trains from random weights, where that is asked for."""
    request = folder.request()
    known = {(one["name"], one["size"]) for one in folder.baselines()}
    for size in request.sizes:
        if "tf-idf" in request.baselines and ("tf-idf", size) not in known:
            folder.add_baseline(tf_idf(folder, size))
    if "scratch" not in request.baselines:
        return None
    _, base = locate(settings)
    return scratch_arm(base, folder.path / "baselines" / "scratch-base", settings.train.seed)


def tf_idf(folder: Folder, size: float) -> Baseline:
    """A linear model over TF-IDF, trained on the same rows and scored on the same held-out ones."""
    began = time.monotonic()
    recipe = Recipe.load(folder.recipe_file, [*SETTINGS, f"data.share={size!r}"])
    try:
        scored = score_tf_idf(recipe)
    except LlmtuneError as error:
        scored = str(error)
    seconds = time.monotonic() - began
    if isinstance(scored, str):
        return {"name": "tf-idf", "status": "skipped", "reason": scored, "size": size, "seconds": seconds}
    rows = {"score": list(scored.scores), "loss": [], "tokens": []}
    return {"name": "tf-idf", "status": "done", "size": size, "seconds": seconds, "rows": rows}  # type: ignore[typeddict-item]
