"""Base and tuned model of a run, as vLLM runs them: one engine with an adapter off and on, or one after the other."""

from typing import Any

from llmtune.errors import FieldError
from llmtune.evaluation.vllm.engine import KEY, VllmModel, check_installed, start_engine
from llmtune.inference.placement import Placement
from llmtune.inference.vllm_adapter import Served, read_adapter
from llmtune.model.base import Base, build_skeleton
from llmtune.recipe.sections import Recipe
from llmtune.run import Run
from llmtune.working import working


def check_run(run: Run, recipe: Recipe) -> None:
    """Raise MachineError where vLLM is missing, and FieldError where it would not run the run's models as trained."""
    check_installed()
    if recipe.model.quantize != "none":
        raise FieldError(
            KEY, f"vllm runs the 16-bit base, and this run trained a {recipe.model.quantize} one; use transformers"
        )
    lost = read_adapter(run.delta)
    if isinstance(lost, str) and not run.done("merge"):
        first = f"first: llmtune merge {run.path}; or use transformers"
        raise FieldError(KEY, f"vllm needs the merged weights, since of the delta it would lose {lost}; {first}")


def load_base(run: Run, base: Base, placement: Placement, context: int) -> VllmModel:
    """Start vLLM on the base, with room for the run's adapter where vLLM takes all of it."""
    adapter = read_adapter(run.delta)
    with working("starting vLLM on the base model"):
        rank = adapter.max_rank if isinstance(adapter, Served) else None
        return VllmModel(
            build_skeleton(base), start_engine(base.folder, placement.dtype, context, rank), placement.dtype
        )


def load_tuned(base_model: VllmModel, run: Run, context: int) -> VllmModel:
    """The tuned model: the base's engine with the adapter, or an engine of its own on the verified merged weights."""
    engine: Any = base_model.engine
    if isinstance(read_adapter(run.delta), Served):
        return VllmModel(base_model.skeleton, engine, base_model.dtype, run.delta)
    del engine
    run.verify("merge")
    base_model.close()
    return VllmModel(base_model.skeleton, start_engine(run.merged, base_model.dtype, context), base_model.dtype)
