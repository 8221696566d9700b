"""The folder of one run."""

from llmtune.run.create import create, open_run
from llmtune.run.folder import STEPS, Run, locates_mistakes, refuse_combined

__all__ = ["STEPS", "Run", "create", "locates_mistakes", "open_run", "refuse_combined"]
