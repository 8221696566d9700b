"""Encoded rows: token ids, and labels that say what is learned."""

from dataclasses import dataclass, field

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One encoded row; labels are -100 where nothing is learned, and the last token is a learned stop token."""

    id: str
    where: str
    input_ids: list[int]
    labels: list[int]
    prompt_size: int = 0
    """Tokens before the last answer: those from which generation starts."""

    @property
    def supervised(self) -> int:
        """The number of learned tokens."""
        return sum(label != IGNORED for label in self.labels)


@dataclass
class Encoded:
    """The encoded rows, and the ids of rows that were dropped, cut or partly learned."""

    examples: list[Example] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    """Ids of rows that were longer than max_length and left out."""
    dropped_lengths: list[int] = field(default_factory=list)
    """The lengths of the dropped rows in tokens, or what they have at least."""
    bounded: list[str] = field(default_factory=list)
    """Ids of dropped rows that are so long that they were not counted to the end."""
    truncated: list[str] = field(default_factory=list)
    """Ids of rows whose prompt was cut at its start."""
    partly_learned: list[str] = field(default_factory=list)
    """Ids of rows where only some answers are learned (the last one is), since the template rewrites the others."""
    template_adds: str = ""
    """The text that the template puts before an answer; it is learned with the answer."""

    def drop(self, name: str, tokens: int, exactly: bool = True) -> None:
        """Note a row that is left out, and its length."""
        self.dropped.append(name)
        self.dropped_lengths.append(tokens)
        if not exactly:
            self.bounded.append(name)
