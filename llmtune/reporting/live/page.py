"""The page of a run or a comparison, written anew when its files have changed."""

import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

from llmtune.arms.stored import FILE, read_comparison
from llmtune.arms.verdict import conclude
from llmtune.errors import LlmtuneError
from llmtune.files import digest_of
from llmtune.reporting.comparison import page as comparison
from llmtune.reporting.document import document, with_script
from llmtune.reporting.html import tag
from llmtune.reporting.page import render
from llmtune.run import open_run

_FILES = ("*.json", "*.jsonl", "recipe.yaml", "eval/*.json")
"""What the page of a run, or of a comparison, is made of."""


class LivePage:
    """A page and its version, which is another one when the files of the folder have changed.

    Raises RecipeError for a folder without a run or a comparison.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._render = _renderer(folder)
        self._shown, self._page = "", ""

    def version(self) -> str:
        """The version of the folder's files as they are now."""
        files = sorted(file for pattern in _FILES for file in self._folder.glob(pattern))
        facts = [(file.name, stat.st_size, stat.st_mtime_ns) for file in files if (stat := _stat(file))]
        return digest_of(facts)[:16]

    def html(self) -> str:
        """The page as the files are now; where they cannot be read this moment, the one from before."""
        with self._lock:
            version = self.version()
            if version != self._shown:
                try:
                    self._page = _refreshing(self._render(), version)
                except LlmtuneError as error:  # what goes on is writing
                    self._page = self._page or _refreshing(_waiting(str(error)), version)
                self._shown = version
            return self._page


def _renderer(folder: Path) -> Callable[[], str]:
    """What renders a folder: a comparison where it holds one, else a run."""
    if (folder / FILE).is_file():
        return lambda: _compared(folder)
    run = open_run(folder)
    return lambda: render(run)


def _compared(folder: Path) -> str:
    """The page of a comparison, with what its numbers say as far as they go now."""
    compared = read_comparison(folder)
    return comparison.render(compared, conclude(compared), folder)


def _refreshing(page: str, version: str) -> str:
    """A page that asks for its version from time to time, and loads itself again where that is another one."""
    return with_script(page, _script()).replace("<html ", f'<html data-version="{version}" ', 1)


def _waiting(reason: str) -> str:
    return document("Not yet", [tag("h1", "Not yet"), tag("p", reason)])


@cache
def _script() -> str:
    return Path(__file__).with_name("live.js").read_text(encoding="utf-8")


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except OSError:  # replaced since
        return None
