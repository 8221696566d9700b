"""What a planned trainer does when transformers' Trainer begins and ends a training, its steps and its reports."""

from typing import Protocol

from transformers import TrainerCallback, TrainerState


class FollowsPlan(Protocol):
    """A trainer that follows a plan; `llmtune.training.planned` says what each of these does."""

    state: TrainerState

    def begin_plan(self) -> None:
        """Called once, when the model is wrapped."""

    def begin_step(self, step: int) -> None:
        """Called before each step."""

    def end_step(self) -> None:
        """Called after each step, before it is validated or saved."""

    def record_step(self, loss: float, gradient_norm: float | None) -> None:
        """Called with what Trainer logs of a step."""

    def record_evaluation(self, loss: float, score: float | None) -> None:
        """Called with what Trainer logs of a validation: its loss, and the score of answers where there is one."""

    def end_plan(self) -> None:
        """Called once, after the last step."""


class PlanCallback(TrainerCallback):
    """Tells a planned trainer when training and its steps begin, and when there are numbers to record."""

    def __init__(self, trainer: FollowsPlan) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: object, **named: object) -> None:
        self.trainer.begin_plan()

    def on_step_begin(self, *_: object, **named: object) -> None:
        self.trainer.begin_step(self.trainer.state.global_step)

    def on_step_end(self, *_: object, **named: object) -> None:
        self.trainer.end_step()

    def on_log(self, *_: object, logs: dict[str, float], **named: object) -> None:
        if "loss" in logs:
            self.trainer.record_step(logs["loss"], logs.get("grad_norm"))

    def on_evaluate(self, *_: object, metrics: dict[str, float], **named: object) -> None:
        if "eval_loss" in metrics:
            self.trainer.record_evaluation(metrics["eval_loss"], metrics.get("eval_score"))

    def on_train_end(self, *_: object, **named: object) -> None:
        self.trainer.end_plan()
