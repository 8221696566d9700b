"""The SQLite file of a study: opened, refused where it is another one, and its libraries kept quiet."""

import contextlib
import json
import logging
import sqlite3
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmtune.errors import MachineError, RecipeError
from llmtune.loggers import quiet_loggers
from llmtune.recipe.compare import differences

if TYPE_CHECKING:
    import optuna

Pruner = Literal["halving", "median", "none"]


def open_study(file: Path, pruner: Pruner) -> "optuna.Study":
    import optuna

    file.parent.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.RDBStorage(address(file), engine_kwargs={"connect_args": {"timeout": 60}})
    return optuna.create_study(storage=storage, study_name="llmtune", pruner=_pruner(pruner), load_if_exists=True)


def address(file: Path) -> str:
    """The URL by which Optuna and its dashboard open a study's file."""
    return f"sqlite:///{file}"


def _pruner(name: Pruner) -> "optuna.pruners.BasePruner":
    from optuna import pruners

    if name == "halving":
        return pruners.SuccessiveHalvingPruner(min_resource=2, reduction_factor=2)
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=3)
    return pruners.NopPruner()


def refuse_foreign(file: Path) -> None:
    """Raise RecipeError for a database that is not Optuna's: nothing is written into it."""
    if not file.exists():
        return
    with contextlib.closing(sqlite3.connect(file)) as database:
        tables = {str(row[0]) for row in database.execute("select name from sqlite_master where type = 'table'")}
    if tables and "studies" not in tables:
        raise RecipeError(f"{file}: is a database without studies; choose another folder with --out")


def refuse_others(file: Path, before: Mapping[str, object] | None, facts: Mapping[str, object]) -> None:
    """Raise RecipeError where a file holds a study of something else."""
    for difference in differences(before, json.loads(json.dumps(facts))) if before is not None else ():
        raise RecipeError(f"{file}: holds another study ({difference}); choose another folder with --out")


@contextlib.contextmanager
def at_work(file: Path) -> Iterator[None]:
    """Read or write a study's file, quietly; raises MachineError or RecipeError where that cannot be done."""
    with _quiet(), _told(file):
        yield


@contextlib.contextmanager
def _told(file: Path) -> Iterator[None]:
    """Tell in one line that a study's file cannot be read or written."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import DatabaseError

    try:
        yield
    except (StorageInternalError, DatabaseError, sqlite3.DatabaseError, OSError) as error:
        cause = str(error.__cause__ or error)
        if "not a database" in cause or "malformed" in cause:
            raise RecipeError(f"{file}: is no SQLite file; choose another folder with --out") from error
        raise MachineError(f"{file}: cannot be written: {cause.splitlines()[0]}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's and Alembic's lines off the terminal: what matters of them is told in llmtune's own."""
    import optuna  # now: it sets its own level when it is imported

    with quiet_loggers((optuna.__name__, "alembic"), logging.ERROR), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="optuna")
        yield
