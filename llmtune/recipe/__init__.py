"""The recipe that a user writes: its sections, YAML with line numbers, and one-line errors."""

from llmtune.recipe.sections import Recipe, dump, load, schema

__all__ = ["Recipe", "dump", "load", "schema"]
