"""How long a run's passes will take together, said before the first one."""

from accelerate import PartialState

from llmtune.model.layout import Layout
from llmtune.recipe.sections import Recipe
from llmtune.run import Run
from llmtune.timing.predicted import run_seconds
from llmtune.timing.seconds import Work
from llmtune.training.passes.choice import RunPasses


def predict_seconds(
    run: Run, recipe: Recipe, layout: Layout, state: PartialState, work: Work, passes: RunPasses
) -> float | None:
    """Seconds of a run's training, for the process that logs; None in others, and where they are not known.

    It is asked before the base is loaded: what is measured for it takes memory.
    """
    if not state.is_main_process:
        return None
    tokens = passes.largest(recipe.train, state.num_processes, work.lengths.longest)
    return run_seconds(run, recipe, layout, work, state.device, state.num_processes, tokens, passes.checkpointing)
