"""What the user writes: sections, YAML with line numbers, and what is said of mistakes."""

from llmtune.recipe.sections import Recipe, dump, load, schema

__all__ = ["Recipe", "dump", "load", "schema"]
