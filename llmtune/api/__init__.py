"""The Python API, which the command line uses too: each function is a command."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from llmtune.answering.request import Options, Request
from llmtune.api.job import begin
from llmtune.api.steps import (
    Folder,
    Overrides,
    at_work,
    do,
    join,
    open_with,
    path_of,
    ready_run,
    require_trained,
    step_function,
)
from llmtune.arms.stored import FILE as COMPARISON
from llmtune.data.sources import problem
from llmtune.errors import RecipeError
from llmtune.exporting.forms import read_form
from llmtune.recipe.sections import Recipe
from llmtune.run import Run
from llmtune.working import importing

if TYPE_CHECKING:
    from llmtune.evaluation.results import Evaluations

__all__ = ["Recipe", "combine", "evaluate", "export", "infer", "merge", "publish", "report", "train"]


def train(
    recipe: Recipe | Folder, out: Path | str | None = None, *, overwrite: bool = False, set: Overrides = ()
) -> Run:
    """Train a recipe in the run folder `out`, or go on with the run in a folder, in child processes; gives the run.

    A run that is trained already is left as it is, unless `overwrite`. Raises LlmtuneError for what ends it early.
    """
    job = begin(recipe, out, overwrite=overwrite, set=set)
    with at_work(job.run):
        job.train()
    return Run(job.run.path)


def evaluate(run: Folder, *, set: Overrides = ()) -> "Evaluations":
    """Evaluate base and tuned model of a trained run; gives what eval/ holds. Raises ProofError, RecipeError."""
    with ready_run(run, "eval", set) as ready:
        return do(ready, "eval")


def infer(
    run: Folder, rows: Path | str, out: Path | str, *, set: Overrides = (), **options: Unpack[Options]
) -> dict[str, Any]:
    """Answer the rows of a file with a run's models, into the .jsonl `out`; gives the summary that lies beside it.

    `options` are those of the command: `model`, `temperature`, `top_p`, `top_k`, `max_new_tokens`, `samples`, `seed`,
    `system` and `overwrite`. Raises RecipeError, TrainingError, ProofError, MachineError, Interrupted.
    """
    request = Request(str(rows), Path(out), **options)
    ready = open_with(run, set)
    require_trained(ready)
    if reason := problem(request.rows):
        raise RecipeError(reason)
    with importing():
        from llmtune.answering.step import infer as answer
    return answer(ready, request)


def merge(run: Folder, *, set: Overrides = ()) -> dict[str, Any]:
    """Write full weights to the run's merged/ and prove them; gives the proof's facts. Raises ProofError."""
    with ready_run(run, "merge", set) as ready:
        return do(ready, "merge")


def combine(
    runs: Sequence[Folder],
    weights: Sequence[float] | None = None,
    how: str = "linear",
    *,
    density: float | None = None,
    out: Path | str | None = None,
    seed: int = 0,
) -> Run:
    """Join the deltas of trained runs of one base, each with its weight, in a new run; gives that run.

    `how` is linear, ties or dare, `density` the share of values that the last two keep, `seed` what dare drops.
    Raises RecipeError for runs that cannot be joined, ProofError where the result is not their combination.
    """
    return join(runs, weights, how, density, out, seed)


def export(run: Folder, to: str, *, llama_cpp: Path | str | None = None, set: Overrides = ()) -> dict[str, Any]:
    """Write the tuned model for another program to the run's exported/, as `to` says; gives facts and files.

    `to` is a form such as gguf:q8_0; `llama_cpp` is the folder with llama.cpp's converter. Raises ProofError,
    RecipeError for an unknown form, MachineError for what is missing.
    """
    read_form(to)
    with ready_run(run, "export", set) as ready:
        return do(ready, "export", to=to, llama_cpp=Path(llama_cpp) if llama_cpp else None)


def publish(run: Folder, *, set: Overrides = (), dry_run: bool = False) -> dict[str, Any]:
    """Upload what the run's recipe says to the Hub; gives where it is. Raises PublishError.

    With `dry_run` nothing is sent: what would go lies in the run's publish/, weights as links; gives the files' sizes.
    """
    with ready_run(run, "publish", set) as ready:
        return step_function("preview")(ready) if dry_run else do(ready, "publish")


def report(run: Folder, *others: Folder, out: Path | str | None = None, set: Overrides = ()) -> Path:
    """Write the page on what the run has done so far; gives its path.

    With other runs, all of them side by side, to the file `out`. The folder of a comparison has its page drawn again.
    Raises RecipeError for `out` beside a single run.
    """
    if others:
        return _side_by_side([run, *others], Path(out or "runs-compared.html"), set)
    if out is not None:
        raise RecipeError(f"-o {out}: is for several runs; the page of one run is its report.html")
    folder = path_of(run)
    if (folder / COMPARISON).is_file():
        from llmtune.reporting.comparison.page import draw_again

        return draw_again(folder)
    with ready_run(run, "report", set) as ready:
        return do(ready, "report")


def _side_by_side(runs: Sequence[Folder], out: Path, set: Overrides) -> Path:
    from llmtune.reporting.comparison.runs import write_runs

    if set:
        raise RecipeError("--set: is for the page of one run; several are shown as they are")
    return write_runs([open_with(run, ()) for run in runs], out)
