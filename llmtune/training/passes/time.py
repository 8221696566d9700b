"""How long a run's passes will take together, said before the first one."""

from accelerate import PartialState

from llmtune.data.gate import Gate
from llmtune.estimate.lengths import counted
from llmtune.model.layout import Layout
from llmtune.recipe.sections import Recipe
from llmtune.run import Run
from llmtune.timing.predicted import run_seconds
from llmtune.timing.seconds import Work
from llmtune.training.passes.choice import RunPasses


def predict_seconds(
    run: Run, recipe: Recipe, layout: Layout, state: PartialState, data: Gate, passes: RunPasses
) -> float | None:
    """Seconds of a run's training, for the process that logs; None in others, and where they are not known.

    It is asked before the base is loaded: what is measured for it takes memory.
    """
    if not state.is_main_process:
        return None
    world, work = state.num_processes, Work(counted(data.train), len(data.eval))
    tokens = passes.largest(recipe.train, world, work.lengths.longest)
    return run_seconds(run, recipe, layout, work, state.device, world, tokens, passes.checkpointing)
