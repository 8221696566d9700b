"""llmtune: fine-tune a language model from a recipe. A method is an adapter and a plan."""

__version__ = "0.1.0"
