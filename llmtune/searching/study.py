"""A study of Optuna in a SQLite file: values are asked for, trained with, told of, and an interrupted one goes on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmtune.searching.file import Pruner, at_work, open_study, refuse_foreign, refuse_others
from llmtune.searching.space import Space, Value, Values

if TYPE_CHECKING:
    import optuna

State = Literal["complete", "pruned", "failed", "running", "waiting"]
_FACTS, _SPENT, _REASON = "llmtune:facts", "llmtune:seconds", "reason"
VALIDATIONS = 10
"""Validations of a trial: enough to tell early that it is behind, few enough to cost little."""
ENDED = "the process that trained it ended"
"""Why a trial failed that was running when its study was left."""


@dataclass(frozen=True)
class Tried:
    """A trial as the study's file has it."""

    number: int
    values: dict[str, Value]
    state: State
    loss: float | None
    """The loss at its end, or where it was pruned."""
    curve: tuple[tuple[int, float], ...]
    """What was reported of it: (step, loss)."""
    seconds: float
    reason: str = ""
    """Why it failed, in one line."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else was told of it."""


class Trial:
    """Values to train with; end it once by `tell`, `prune` or `fail`."""

    def __init__(self, study: "optuna.Study", trial: "optuna.Trial", values: dict[str, Value], file: Path) -> None:
        self._study, self._trial, self._file = study, trial, file
        self.number, self.values = trial.number, values

    def report(self, step: int, loss: float) -> bool:
        """Report a validation's loss; gives whether the trial is so far behind the others that it should end.

        Steps are compared between trials: count validations where trials have different numbers of steps.
        """
        if not math.isfinite(loss):
            return False  # what is no number ends the training itself
        with at_work(self._file):
            self._trial.report(loss, step)
            return self._trial.should_prune()

    def tell(self, loss: float, **facts: object) -> None:
        """End the trial with its final loss; one that is no finite number makes it a failed one."""
        if not math.isfinite(loss):
            self.fail(f"its loss is {loss}", **facts)
            return
        self._note(facts)
        with at_work(self._file):
            self._study.tell(self._trial, loss)

    def prune(self, **facts: object) -> None:
        """End the trial early, with the loss that was reported last."""
        self._end("PRUNED", facts)

    def fail(self, reason: str, **facts: object) -> None:
        """End the trial without a loss, and say why."""
        self._end("FAIL", {_REASON: reason, **facts})

    def _end(self, state: str, facts: Mapping[str, object]) -> None:
        from optuna.trial import TrialState

        self._note(facts)
        with at_work(self._file):
            self._study.tell(self._trial, state=TrialState[state])

    def _note(self, facts: Mapping[str, object]) -> None:
        with at_work(self._file):
            for key, value in facts.items():
                self._trial.set_user_attr(key, value)


class Study:
    """A search for the values with the lowest loss; one process at a time works on its file."""

    def __init__(self, study: "optuna.Study", space: Space, seed: int, file: Path) -> None:
        self._study, self.space, self._seed, self._file = study, space, seed, file
        self._distributions = {key: one.distribution() for key, one in space.items()}

    @classmethod
    def open(
        cls,
        file: Path,
        facts: Mapping[str, object],
        space: Space,
        *,
        seed: int = 0,
        pruner: Pruner = "median",
        first: Sequence[Values] = (),
    ) -> "Study":
        """The study in a SQLite file, or a new one, in which the values `first` are tried first.

        `facts` are flat values that say what is searched, such as a recipe's by dotted key. The caller keeps other
        processes out: trials that are running in the file belong to one that ended, fail, and are asked for again.
        Raises RecipeError for a file with a study of other facts, or without one; MachineError for one that cannot be
        written.
        """
        with at_work(file):
            refuse_foreign(file)
            study = open_study(file, pruner)
            opened = cls(study, space, seed, file)
            refuse_others(file, study.user_attrs.get(_FACTS), facts)
            if _FACTS not in study.user_attrs:
                for values in first:
                    study.enqueue_trial(dict(values))
                study.set_user_attr(_FACTS, dict(facts))
            opened._take_up()
        return opened

    def enqueue(self, values: Values) -> None:
        """Have values tried before any that are drawn."""
        with at_work(self._file):
            self._study.enqueue_trial(dict(values))

    def ask(self) -> Trial:
        """The next trial: values that wait, else values that are drawn where losses were low.

        The same seed and the same trials before give the same values, in one process or over several.
        """
        from optuna.samplers import TPESampler

        with at_work(self._file):
            # A sampler's random state dies with its process: each trial has a seed of its own.
            count = len(self._study.trials)
            self._study.sampler = TPESampler(seed=self._seed + count, n_startup_trials=5)
            trial = self._study.ask(self._distributions)
        return Trial(self._study, trial, dict(trial.params), self._file)

    @property
    def waits(self) -> int:
        """How many values wait to be tried."""
        return sum(tried.state == "waiting" for tried in self.trials)

    @property
    def trials(self) -> list[Tried]:
        """Every trial, in order."""
        with at_work(self._file):
            return [_tried(trial) for trial in self._study.get_trials(deepcopy=False)]

    @property
    def ended(self) -> list[Tried]:
        """The trials that came to an end of their own, in order."""
        ends = ("complete", "pruned", "failed")
        return [tried for tried in self.trials if tried.state in ends and tried.reason != ENDED]

    @property
    def best(self) -> Tried | None:
        """The complete trial with the lowest loss; None before there is one."""
        complete = [tried for tried in self.trials if tried.state == "complete" and tried.loss is not None]
        return min(complete, key=lambda tried: tried.loss or 0.0, default=None)

    @property
    def seconds(self) -> float:
        """Seconds that were spent on it, as `spend` counted them."""
        return float(self._study.user_attrs.get(_SPENT, 0.0))

    def spend(self, seconds: float) -> None:
        """Count seconds that were spent on it."""
        self.note(_SPENT, self.seconds + seconds)

    def note(self, key: str, value: object) -> None:
        """Keep a JSON value with the study."""
        with at_work(self._file):
            self._study.set_user_attr(key, value)

    def noted(self, key: str) -> Any:
        """The value that `note` kept; None where there is none."""
        return self._study.user_attrs.get(key)

    def importances(self) -> dict[str, float]:
        """Which share of what differs between complete trials each key explains; empty for few trials or one key."""
        complete = [tried for tried in self.trials if tried.state == "complete"]
        if len(complete) < 4 or len(self.space) < 2:
            return {}
        from optuna.importance import get_param_importances

        with at_work(self._file):
            return {key: float(share) for key, share in get_param_importances(self._study).items()}

    def _take_up(self) -> None:
        """Fail the trials of a process that ended, and let their values be tried again."""
        from optuna.trial import TrialState

        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)
            if set(trial.params) == set(self.space):
                self._study.enqueue_trial(dict(trial.params))


def _tried(trial: "optuna.trial.FrozenTrial") -> Tried:
    states: dict[str, State] = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "WAITING": "waiting"}
    state = states.get(trial.state.name, "running")
    curve = tuple(sorted(trial.intermediate_values.items()))
    last = curve[-1][1] if curve else None
    reason = trial.user_attrs.get(_REASON, ENDED if state == "failed" else "")
    seconds = trial.duration.total_seconds() if trial.duration else 0.0
    facts = {key: value for key, value in trial.user_attrs.items() if key != _REASON}
    loss = trial.values[0] if state == "complete" and trial.values else last if state == "pruned" else None
    return Tried(trial.number, dict(trial.params), state, loss, curve, seconds, reason, facts)
