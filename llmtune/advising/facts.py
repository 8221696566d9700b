"""What advice depends on: facts of the data, the base and the machine. Importing this imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from llmtune.data.row import Row
from llmtune.evaluation.held_out.choice import AnswerFacts
from llmtune.working import working

KINDS = ("labels", "json", "text")
DEVICES = ("cpu", "gpu")
_LOOKED_AT = 5000
"""Rows whose answers decide what kind of data it is."""


@dataclass(frozen=True)
class Facts:
    """What conditions of rules may name; None where it is not known, which no condition meets."""

    rows: int | None = None
    """Training rows."""
    kind: str | None = None
    """Answers that repeat like labels, answers that are all JSON, or text."""
    labels: int | None = None
    """Different labels; 0 where answers are none."""
    held_out: int | None = None
    """Rows on which base and tuned model are compared."""
    parameters: int | None = None
    """Of the base."""
    device: str | None = None
    """cpu or gpu."""
    minutes: float | None = None
    """The budget for a training; without one, what LoRA takes for the recipe's epochs."""
    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    adapter: str | None = None
    """The adapter that the recipe names; none where the model's own tensors train."""
    all_linear: bool | None = None
    """Whether that adapter goes to all linear layers."""
    lora_fits: bool | None = None
    """Whether LoRA over the base in 16 bits fits into memory."""
    lora_rate: float | None = None
    """LoRA's rate x alpha / 32."""
    load: float | None = None
    """Tokens of answers for each parameter that LoRA trains."""


NAMES = tuple(one.name for one in fields(Facts))


def answers_of(rows: Sequence[Row]) -> AnswerFacts:
    """The facts of answers, of rows that are spread over all."""
    answers, every = AnswerFacts(), max(1, len(rows) // _LOOKED_AT)
    with working("looking at the answers"):
        for place in range(0, len(rows), every):
            row = rows[place]
            if row.messages:
                answers.add_row(row)
    return answers


def kind_of(answers: AnswerFacts) -> str:
    """The kind of data that answers make: labels, json or text."""
    if answers.rows and answers.is_json:
        return "json"
    return "labels" if answers.labels else "text"


def count_labels(answers: AnswerFacts) -> int:
    """How many labels there are; 0 where answers are of another kind."""
    return len(answers.labels) if kind_of(answers) == "labels" else 0
