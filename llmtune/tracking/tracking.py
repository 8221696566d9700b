"""Trackers of one run, through transformers' callbacks; one that fails is left out, with a warning."""

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.errors import LlmtuneError, first_line
from llmtune.files import read_json, write_json
from llmtune.run import Run
from llmtune.run_log import Record
from llmtune.tracking.facts import facts_of
from llmtune.tracking.kinds import KINDS, PROJECT, environment
from llmtune.working import working

if TYPE_CHECKING:
    from transformers import TrainerCallback

FOLDER, IDS = "tracking", "ids.json"
Recorder = Callable[[Record], None]


class TrackedArguments:
    """Stands for transformers' arguments where its callbacks send them: they get the facts of the run alone."""

    def __init__(self, facts: dict[str, Any], name: str, folder: Path) -> None:
        self._facts = facts
        self.run_name, self.project, self.output_dir = name, PROJECT, str(folder)
        # Trackio keeps a run on this machine unless these name a Space; what is sent on is private.
        self.trackio_space_id = self.trackio_bucket_id = None
        self.trackio_static_space_id, self.hub_private_repo = False, True

    def to_dict(self) -> dict[str, Any]:
        """The facts."""
        return dict(self._facts)

    def to_json_string(self) -> str:
        """The facts as text, one a line."""
        return "\n".join(f"{key}: {value}" for key, value in self._facts.items())


class Tracking:
    """The trackers of a run; each failure of one is a warning in the log, and the end of that tracker alone."""

    def __init__(self, run: Run, names: Sequence[str], start_step: int, record: Recorder) -> None:
        from transformers import TrainerState

        self._folder = run.path.resolve() / FOLDER
        self._ids = self._read_ids()
        self._record, self._start = record, start_step
        self._arguments = TrackedArguments(facts_of(run), f"{run.path.resolve().name}-{self._ids['run']}", self._folder)
        self._state: TrainerState = TrainerState(is_world_process_zero=True, global_step=start_step)
        self._live: dict[str, TrainerCallback] = {}
        self._variables = ExitStack()
        for name in names:
            with working(f"starting {name}"):
                self._try(name, partial(self._begin, name))

    def send(self, entry: Record) -> None:
        """Send the numbers of a record: loss, rates, speed, memory, validation loss."""
        self._state.global_step = entry["step"]
        numbers = dict(_numbers(entry))
        if "loss" in numbers or "eval_loss" in numbers:
            for name in list(self._live):
                self._call(name, "on_log", logs=dict(numbers))

    def end(self) -> None:
        """Let each tracker send what it has, and close."""
        for name in list(self._live):
            with working(f"closing {name}"):
                self._call(name, "on_train_end")
                _forget_settings(name)
        self._variables.close()

    def _begin(self, name: str) -> None:
        kind = KINDS[name]
        may_stay = kind.fallback and not any(key in os.environ for key in kind.fallback)
        try:
            self._open(name)
        except Exception as error:
            if not may_stay:
                raise
            _forget_settings(name)
            self._open(name, **kind.fallback)
            message = f"{name}: {first_line(error)}; its numbers are kept in {self._folder}, and {kind.advice}"
            self._record({"step": self._state.global_step, "warning": f"warning: {message}"})

    def _open(self, name: str, **more: str) -> None:
        if name == "mlflow" and "mlflow" in self._ids:
            more["MLFLOW_RUN_ID"] = self._ids["mlflow"]
        # Trackers read some of these variables later, with the first number.
        self._variables.enter_context(environment(name, self._folder, self._ids["run"], **more))
        self._live[name] = _callback(name, self._start)
        self._call(name, "on_train_begin", raises=True)
        if name == "mlflow":
            import mlflow

            self._ids["mlflow"] = mlflow.active_run().info.run_id
            write_json(self._folder / IDS, self._ids)

    def _call(self, name: str, event: str, raises: bool = False, **named: object) -> None:
        from transformers import TrainerControl

        def call() -> None:
            getattr(self._live[name], event)(self._arguments, self._state, TrainerControl(), model=None, **named)

        if raises:
            call()
        else:
            self._try(name, call)

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a tracker fails in ways of its own, and no training ends for it
            self._live.pop(name, None)
            step = self._state.global_step
            self._record({"step": step, "warning": f"warning: {name} gets nothing more: {first_line(error)}"})

    def _read_ids(self) -> dict[str, str]:
        """The ids by which trackers know the run: a resumed run goes on under the same."""
        file = self._folder / IDS
        try:
            ids = read_json(file)
        except LlmtuneError:
            ids = None
        if not isinstance(ids, dict) or not isinstance(ids.get("run"), str):
            ids = {"run": secrets.token_hex(4)}
            write_json(file, ids)
        return {key: value for key, value in ids.items() if isinstance(value, str)}


@contextmanager
def tracked(run: Run, start_step: int, record: Recorder, reports: bool) -> Iterator[Recorder | None]:
    """What sends records to the recipe's trackers, in the one process that `reports`; None where nothing does.

    `record` takes warnings.
    """
    names = run.recipe().track
    if not names or not reports:
        yield None
        return
    tracking = Tracking(run, names, start_step, record)
    try:
        yield tracking.send
    finally:
        tracking.end()


def _forget_settings(name: str) -> None:
    """Let wandb finish and read its variables anew, else the next run of this process would be the same one to it."""
    if name == "wandb":
        import wandb

        with suppress(Exception):
            wandb.teardown()


def _callback(name: str, start_step: int) -> "TrainerCallback":
    from transformers.integrations import get_reporting_integration_callbacks

    (kind,) = get_reporting_integration_callbacks([name])
    if name != "tensorboard":
        return kind()
    from torch.utils.tensorboard import SummaryWriter

    # What a killed run wrote beyond its checkpoint is hidden: the steps come again.
    return kind(SummaryWriter(os.environ["TENSORBOARD_LOGGING_DIR"], purge_step=start_step + 1))


def _numbers(entry: Record, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record but its step, those of nested mappings as lr/1."""
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            yield f"{prefix}{key}", value
