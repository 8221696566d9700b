"""A run's other settings, given to child processes through the recipe in its folder."""

import contextlib
from collections.abc import Iterator

from llmtune.errors import Interrupted, LlmtuneError
from llmtune.files import write_text
from llmtune.run.folder import Run


@contextlib.contextmanager
def kept_for_children(run: Run) -> Iterator[None]:
    """Give child processes a run's other settings through its recipe; an error puts the old ones back."""
    before = run.recipe_file.read_text(encoding="utf-8")
    run.keep_settings()
    try:
        yield
    except LlmtuneError as error:
        if not isinstance(error, Interrupted):
            write_text(run.recipe_file, before)
        raise
