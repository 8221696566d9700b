"""What a format of rows is: its columns, when a record fits it, and how its records are parsed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmtune.data.row import Message, Tool

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Content:
    """What a record holds."""

    messages: tuple[Message, ...]
    used: tuple[str, ...]
    """The columns that were read, in their order."""
    unused: frozenset[str] = frozenset()
    """Keys inside columns that llmtune does not use."""
    tools: tuple[Tool, ...] = ()
    text: str | None = None


@dataclass(frozen=True)
class Format:
    """A format of rows."""

    name: str
    needed: tuple[str, ...]
    """The fields without which a record is no such row."""
    optional: tuple[str, ...]
    """The other fields that it reads."""
    fits: Callable[[Record], bool]
    """Whether a record is such a row, by its columns."""
    parse: Callable[[str, Record], Content]
    """Parses a record that has the needed columns; takes its place and raises RecipeError."""
    says: str = ""
    """What `check` adds to the format's name."""

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields that data.map may fill."""
        return (*self.needed, *self.optional, "id")

    def missing(self, record: Record) -> list[str]:
        """The needed columns that a record lacks; none where other columns of it stand in for them."""
        missing = [name for name in self.needed if name not in record]
        return [] if missing and self.fits(record) else missing
