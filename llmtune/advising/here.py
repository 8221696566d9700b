"""What a recipe takes on this machine: memory, and time at the rate of its card or of its CPU."""

from llmtune.estimate.fit import Fit, judge
from llmtune.estimate.passes import setting_of
from llmtune.launch.command import choose_config, count_processes
from llmtune.launch.devices import launch_device
from llmtune.machine.device import free_bytes
from llmtune.model.layout import Layout
from llmtune.plan.table import PlanTable
from llmtune.recipe.sections import Recipe
from llmtune.timing.predicted import question_of
from llmtune.timing.rate import card_rate
from llmtune.timing.seconds import Work, seconds_here
from llmtune.training.prepare import as_launched


def fit_here(recipe: Recipe, layout: Layout, table: PlanTable, work: Work, gpus: int) -> tuple[Fit, float | None]:
    """What a recipe takes on this machine with so many GPUs, and the seconds of its training, None where not known.

    On CPUs the seconds are those of the second value alone: `Fit` has a card's.
    """
    recipe = as_launched(recipe, table, gpus)
    device = launch_device(recipe.launch)
    world = count_processes(recipe.launch, choose_config(recipe.launch, gpus), gpus)
    setting = setting_of(recipe, world, device.type)
    name = "this machine" if device.type == "cpu" else f"this machine's {device}"
    question = question_of(recipe, table, work)
    fit = judge(recipe, layout, question, setting, name, free_bytes(device), card_rate(device))
    if device.type != "cpu" or fit.size is None:
        return fit, fit.seconds
    return fit, seconds_here(recipe, layout, table, setting, work, fit.size.checkpointing)
