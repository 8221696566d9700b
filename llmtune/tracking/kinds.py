"""What each tracker needs: its package, and the variables that it reads in its environment."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from llmtune.errors import FieldError, MachineError

PROJECT = "llmtune"


@dataclass(frozen=True)
class Kind:
    """A tracker; in the variables, {folder} is the run's folder for trackers and {id} the run's id with them."""

    package: str
    defaults: dict[str, str] = field(default_factory=dict)
    """Variables that are set where the user has not."""
    fixed: dict[str, str] = field(default_factory=dict)
    """Variables that are always set: nothing but numbers and settings leaves the machine."""
    fallback: dict[str, str] = field(default_factory=dict)
    """Variables that make it keep everything on this machine, where it does not start and the user set none of them."""
    advice: str = ""
    """What to do with what it keeps there."""


KINDS = {
    "tensorboard": Kind("tensorboard", {"TENSORBOARD_LOGGING_DIR": "{folder}/tensorboard"}),
    "trackio": Kind("trackio"),
    "wandb": Kind(
        "wandb",
        {"WANDB_PROJECT": PROJECT, "WANDB_DIR": "{folder}", "WANDB_INIT_TIMEOUT": "30"},
        {
            **{"WANDB_RUN_ID": "{id}", "WANDB_RESUME": "allow", "WANDB_CONSOLE": "off", "WANDB_SILENT": "true"},
            **{"WANDB_DISABLE_CODE": "true", "WANDB_DISABLE_GIT": "true"},
            **{"WANDB_LOG_MODEL": "false", "WANDB_WATCH": "false"},
        },
        {"WANDB_MODE": "offline"},
        "wandb sync sends it",
    ),
    "mlflow": Kind(
        "mlflow",
        {"MLFLOW_EXPERIMENT_NAME": PROJECT},
        {"HF_MLFLOW_LOG_ARTIFACTS": "FALSE", "MLFLOW_FLATTEN_PARAMS": "TRUE"},
        {"MLFLOW_TRACKING_URI": "file:{folder}/mlflow", "MLFLOW_ALLOW_FILE_STORE": "true"},
        "mlflow ui --backend-store-uri shows it",
    ),
}


def check_installed(trackers: Sequence[str]) -> None:
    """Raise FieldError for a tracker whose package is not installed."""
    for name in trackers:
        package = KINDS[name].package
        if importlib.util.find_spec(package) is None:
            message = f"{name} is not installed; try pip install {package}, or leave it out"
            raise FieldError("track", message, MachineError)


@contextmanager
def environment(name: str, folder: Path, run_id: str, **more: str) -> Iterator[None]:
    """The variables that a tracker reads, in this process's environment while the block runs."""
    kind = KINDS[name]
    defaults = {key: value for key, value in kind.defaults.items() if key not in os.environ}
    wanted = {**defaults, **kind.fixed, **more}
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update({key: value.format(folder=folder, id=run_id) for key, value in wanted.items()})
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
