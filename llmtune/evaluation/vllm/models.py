"""Base and tuned model of a run, as vLLM runs them: one after the other, the tuned one as its merged weights."""

from llmtune.errors import FieldError
from llmtune.evaluation.vllm.engine import KEY, VllmModel, check_installed, start_engine
from llmtune.inference.placement import Placement
from llmtune.model.base import Base, build_skeleton
from llmtune.recipe.sections import Recipe
from llmtune.run import Run
from llmtune.working import working


def check_run(run: Run, recipe: Recipe) -> None:
    """Raise MachineError where vLLM is missing, and FieldError where it would not run the run's models as trained."""
    check_installed()
    if recipe.model.quantize != "none":
        reason = f"vllm runs the 16-bit base, and this run trained a {recipe.model.quantize} one"
        raise FieldError(KEY, f"{reason}; use transformers")
    if not run.done("merge"):
        # vLLM 0.32 scores the tokens of a prompt wrongly, or not at all, while an adapter is on.
        raise FieldError(KEY, f"vllm asks the merged weights; first: llmtune merge {run.path}; or use transformers")
    run.verify("merge")


def load_base(base: Base, placement: Placement, context: int) -> VllmModel:
    """Start vLLM on the base."""
    with working("starting vLLM on the base model"):
        engine = start_engine(base.folder, placement.dtype, context)
        return VllmModel(build_skeleton(base), engine, placement.dtype, context)


def load_tuned(base_model: VllmModel, run: Run, context: int) -> VllmModel:
    """End vLLM on the base, and start it on the merged weights."""
    base_model.close()
    engine = start_engine(run.merged, base_model.dtype, context)
    return VllmModel(base_model.skeleton, engine, base_model.dtype, context)
