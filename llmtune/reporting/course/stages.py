"""Where the stages of a plan begin, as marks on charts over steps."""

from llmtune.plan.table import PlanTable


def boundaries(plan: PlanTable | None) -> list[tuple[float, str]]:
    """Return the first step and the name of each stage, nothing where there is but one."""
    stages = plan.stages if plan else []
    return [(stage.start, f"stage {number}") for number, stage in enumerate(stages, 1)] if len(stages) > 1 else []
