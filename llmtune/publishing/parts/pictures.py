"""The pictures beside a card: the loss, and the plan."""

from dataclasses import dataclass

from llmtune.plan.table import PlanTable
from llmtune.publishing.markdown import picture
from llmtune.reporting.charts.drawing import line_picture
from llmtune.reporting.charts.plan import plan_image, plan_words
from llmtune.reporting.course.loss import loss_chart
from llmtune.reporting.history import read_history
from llmtune.run import Run
from llmtune.run_log import read_log


@dataclass(frozen=True)
class Picture:
    """An SVG file of a repository, with what it shows in words and the line under it."""

    file: str
    svg: str
    words: str
    caption: str

    @property
    def markdown(self) -> str:
        """The picture as the card shows it."""
        return f"{picture(self.words, self.file)}\n\n{self.caption}"


def plan_picture(run: Run) -> Picture:
    """Draw the plan of a run."""
    plan = PlanTable.read(run.plan_file)
    caption = "What trains when: a column a stage, a row for layers that train alike; the deeper, the higher the rate."
    return Picture("figures/plan.svg", plan_image(plan), plan_words(plan), caption)


def loss_picture(run: Run) -> Picture | None:
    """Draw the loss of a run; None where its log has none."""
    history = read_history(read_log(run.log_file))
    if not (history.losses or history.validation_losses):
        return None
    chart = loss_chart(history, PlanTable.read(run.plan_file))
    validation = " Dashed: validation." if history.validation_losses else ""
    scale = " The scale is logarithmic." if chart.y.log else ""
    caption = f"Loss by step, mean cross-entropy per answer token: running average; pale: each step.{validation}{scale}"
    return Picture("figures/loss.svg", line_picture(chart), chart.label, caption)


def pictures(run: Run) -> list[Picture]:
    """Draw every picture of a run's card; none of a combination, which nothing trained."""
    if run.combined:
        return []
    return [one for one in (loss_picture(run), plan_picture(run)) if one]
