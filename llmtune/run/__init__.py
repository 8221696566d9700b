"""The folder of one run."""

from llmtune.run.create import create, open_run
from llmtune.run.folder import STEPS, Run, locates_mistakes, refuse_combined
from llmtune.run.kept import kept_for_children

__all__ = ["STEPS", "Run", "create", "kept_for_children", "locates_mistakes", "open_run", "refuse_combined"]
