"""What a recipe says of how rows become examples."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmtune.recipe.data import Data


@dataclass(frozen=True)
class Rules:
    """How rows become examples; everything, with tokenizer and template, that the result depends on."""

    max_length: int
    """Tokens of an example at most."""
    overlength: str = "drop"
    learn: str = "answers"
    reasoning: str = "learn"
    template: Mapping[str, Any] = field(default_factory=dict)
    """Values for the chat template."""

    @classmethod
    def of(cls, data: Data) -> "Rules":
        """The rules of a recipe's data section."""
        return cls(data.max_length, data.overlength, data.learn, data.reasoning, data.template)
