"""Loggers of libraries are as loud after a piece of work as before it."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest

from llmtune.data.sources.columnar import columnar
from llmtune.data.sources.cursor import Cursor
from llmtune.errors import RecipeError
from llmtune.loggers import quiet_loggers
from llmtune.publishing import hub
from llmtune.recipe.sections import Publish

NAMES = ("llmtune.test.a", "llmtune.test.b")


def levels(names: tuple[str, ...] = NAMES) -> list[int]:
    """The levels of loggers."""
    return [logging.getLogger(name).level for name in names]


@pytest.fixture
def loud(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loggers of `datasets` and the Hub as their user set them."""
    for name in ("datasets", "huggingface_hub"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.DEBUG)


def test_loggers_are_quiet_inside_and_as_before_afterwards() -> None:
    logging.getLogger(NAMES[0]).setLevel(logging.DEBUG)
    with quiet_loggers(NAMES, logging.ERROR):
        with quiet_loggers(NAMES[:1], logging.CRITICAL):
            assert levels() == [logging.CRITICAL, logging.ERROR]
        assert levels() == [logging.ERROR, logging.ERROR]
    assert levels() == [logging.DEBUG, logging.NOTSET]
    with pytest.raises(KeyError), quiet_loggers(NAMES, logging.ERROR):
        raise KeyError
    assert levels() == [logging.DEBUG, logging.NOTSET]


def test_blocks_may_end_in_any_order() -> None:
    logging.getLogger(NAMES[0]).setLevel(logging.INFO)
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(quiet_loggers(NAMES, logging.CRITICAL))
    second.enter_context(quiet_loggers(NAMES, logging.ERROR))
    first.close()
    assert levels() == [logging.ERROR, logging.ERROR]
    second.close()
    assert levels() == [logging.INFO, logging.NOTSET]


def test_a_logger_that_is_quieter_stays_so() -> None:
    logging.getLogger(NAMES[0]).setLevel(logging.CRITICAL)
    with quiet_loggers(NAMES[:1], logging.ERROR):
        assert levels(NAMES[:1]) == [logging.CRITICAL]
    assert levels(NAMES[:1]) == [logging.CRITICAL]


@pytest.mark.usefixtures("loud")
def test_reading_files_in_columns_leaves_the_log_of_datasets_as_it_was(tmp_path: Path) -> None:
    read = columnar("parquet", "a Parquet file", batch_size=1000)
    file = tmp_path / "t.parquet"
    datasets.Dataset.from_list([{"prompt": str(n)} for n in range(3)]).to_parquet(file)
    first, second = (read(file, Cursor(str(file))) for _ in range(2))
    assert [next(rows)["prompt"] for rows in (first, second)] == ["0", "0"]
    assert levels(("datasets",)) == [logging.CRITICAL]
    assert len([*first, *second]) == 4
    file = tmp_path / "junk.parquet"
    file.write_bytes(b"PAR1junkPAR1")
    with pytest.raises(RecipeError, match="not a Parquet file"):
        list(read(file, Cursor(str(file))))
    assert levels(("datasets",)) == [logging.DEBUG]


@pytest.mark.usefixtures("loud")
def test_asking_the_hub_leaves_its_log_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    target: Any = hub.target(Publish(repo="me/mine"))
    assert levels(("huggingface_hub",)) == [logging.DEBUG]
    assert target.ask("looking at", lambda: levels(("huggingface_hub",))) == [logging.ERROR]
    assert levels(("huggingface_hub",)) == [logging.DEBUG]
