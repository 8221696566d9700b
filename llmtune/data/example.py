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
    is_text: bool = False
    """Whether it is a piece of plain text, of which every token is learned and which need not end in a stop token."""

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
    cut_at_turn: list[str] = field(default_factory=list)
    """Ids of conversations whose last turns were left out."""
    partly_learned: list[str] = field(default_factory=list)
    """Ids of rows where only some answers are learned (the last one is), since the template rewrites the others."""
    split_rows: list[str] = field(default_factory=list)
    """Ids of conversations that became several examples, since the template rewrites earlier turns."""
    split_examples: int = 0
    """The examples that they became."""
    split_tokens: int = 0
    """The tokens that this costs: those of these examples without the last one of each conversation."""
    tokens: int = 0
    """The tokens of all examples."""
    template_adds: str = ""
    """The text that the template puts before an answer; it is learned with the answer."""
    thinking_block: str = ""
    """The empty thinking block that the template puts before an answer; it is context, and generation starts behind."""
    with_block: int = 0
    """Examples whose last answer has it."""
    without_block: int = 0
    """Examples of conversations whose last answer does not have it."""

    @property
    def served_block(self) -> str:
        """The empty thinking block from behind which the tuned model is served: none where it learned to reason."""
        return "" if self.without_block else self.thinking_block

    def add(self, example: Example) -> None:
        """Add an example."""
        self.examples.append(example)
        self.tokens += len(example.input_ids)

    def drop(self, name: str, tokens: int, exactly: bool = True) -> None:
        """Note a row that is left out, and its length."""
        self.dropped.append(name)
        self.dropped_lengths.append(tokens)
        if not exactly:
            self.bounded.append(name)

    def merge(self, other: "Encoded") -> None:
        """Add what another call encoded."""
        for name, value in vars(other).items():
            own = getattr(self, name)
            setattr(self, name, (own or value) if isinstance(value, str) else own + value)

    def notes(self) -> list[str]:
        """Return what people should know of how the rows became examples, one line each."""
        cost = self.tokens / max(1, self.tokens - self.split_tokens)
        lines = [
            (
                self.split_rows,
                f"{len(self.split_rows)} conversations become {self.split_examples} examples, since the template "
                f"drops or rewrites earlier turns: {cost:.1f}x the tokens; data.learn: last_answer learns one a row",
            ),
            (self.cut_at_turn, f"{len(self.cut_at_turn)} conversations are cut at a turn, to fit into max_length"),
            (
                self.thinking_block,
                f"the chat template puts {self.thinking_block!r} before {self.with_block} answers without reasoning: "
                "it is context, not learned, and generation starts behind it",
            ),
        ]
        return [line for applies, line in lines if applies]
