"""A comparison on a tiny base, whose workers run in this process."""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import pytest

from llmtune.comparing import running
from llmtune.errors import Interrupted
from llmtune.pool import opening
from llmtune.pool.task import Ended, Task
from tests.support import tiny


class Here:
    """A pool that runs tasks in this process, one after another."""

    def width(self, gpus: int = 0) -> int:
        """One at a time."""
        return 1

    def run(self, tasks: Sequence[Task], ended: Callable[[Ended], None]) -> None:
        """Run every task."""
        for task in tasks:
            code = import_module(task.module).main(list(task.words))
            if code:
                raise Interrupted("stopped")
            ended(Ended(task, code))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers run in this process, which has imported torch already."""
    monkeypatch.setattr(opening, "open_pool", lambda on, folder: Here())
    monkeypatch.setattr(running, "START_SECONDS", 0.0)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of a tiny base with 24 training, 6 validation and 5 held-out rows."""
    base = tiny.save_base(tmp_path / "base", blocks=2)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(30))
    test = tiny.write_rows(tmp_path / "test.jsonl", tiny.sums(5, 100))
    data = {"train": str(rows), "eval_fraction": 0.2, "test": str(test)}
    return tiny.write_recipe(tmp_path / "mine.yaml", base, rows, data=data)
