"""How the next token of an answer is chosen: the settings, as options and as `/set` in a chat name them."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from llmtune.errors import nearest


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; raises ValueError for a value that no model can follow."""

    temperature: float = 0.0
    """0 always takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 for all tokens."""
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "temperature": (0 <= self.temperature < math.inf, "a number from 0 on"),
            "top_p": (0 < self.top_p <= 1, "a number above 0, up to 1"),
            "top_k": (self.top_k >= 0, "a whole number from 0 on, 0 for all tokens"),
            "max_new_tokens": (self.max_new_tokens >= 1, "a whole number from 1 on"),
            "seed": (0 <= self.seed < 2**63, "a whole number from 0 on, below 2**63"),
        }
        for name, (fits, expected) in limits.items():
            if not fits:
                raise ValueError(f"{name} is {expected}, not {getattr(self, name)}")

    def changed(self, text: str) -> Self:
        """The same with values from `temperature=0.7 top_p=0.9`; raises ValueError in one line."""
        values: dict[str, Any] = {}
        for pair in text.split():
            name, _, value = pair.partition("=")
            if name not in asdict(self):
                raise ValueError(f"there is no {name}; {', '.join(asdict(self))}{nearest(name, list(asdict(self)))}")
            kind = type(asdict(self)[name])
            try:
                values[name] = kind(value)
            except ValueError as error:
                raise ValueError(
                    f"{name}={value}: {'a whole number' if kind is int else 'a number'} is expected"
                ) from error
        return replace(self, **values)

    def in_words(self) -> str:
        """The values as `changed` takes them."""
        return " ".join(f"{name}={value:g}" for name, value in asdict(self).items())
