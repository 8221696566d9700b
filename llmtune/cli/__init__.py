"""The command line: its commands, `llmtune init` and `llmtune chat`."""

from llmtune.cli.commands import main

__all__ = ["main"]
