"""The command line: its commands, `llmtune init` and `llmtune chat`."""

from llmtune.cli.app import main

__all__ = ["main"]
