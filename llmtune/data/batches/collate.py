"""Collates examples into a right-padded batch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmtune.data.encoding.encode import IGNORED
from llmtune.errors import TrainingError


@dataclass
class TokenCounts:
    """Tokens that went through the model, those with a label, and the places that batches had for tokens."""

    seen: int = 0
    supervised: int = 0
    slots: int = 0

    def add(self, other: "TokenCounts") -> None:
        """Add another count to this one."""
        self.seen += other.seen
        self.supervised += other.supervised
        self.slots += other.slots

    @property
    def padding(self) -> float:
        """The share of the places that stayed empty."""
        return 1 - self.seen / max(1, self.slots)

    def record(self, step: "TokenCounts") -> dict[str, float]:
        """What the log says of these counts of a run, and of its latest step's."""
        return {"tokens": self.seen, "supervised": self.supervised, "padding": step.padding}


def refuse_unlabelled(supervised: torch.Tensor | int) -> None:
    """Raise TrainingError for no supervised token; a tensor is not read, since a device would have to be waited for."""
    if isinstance(supervised, int) and supervised == 0:
        raise TrainingError("a batch has no supervised token, so nothing can be learned from it")


class Collator:
    """Pads a list of {"input_ids", "labels"} on the right; an "index" of the examples is passed on.

    The pad token may be the stop token: a stop token of an example is still learned. Arrays take a hundredth of the
    time of lists.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return LongTensors (B, T) input_ids, attention_mask (0 on padding) and labels (-100 on padding).

        What a step has to know of them on the host comes along, so that it reads nothing from a device: `rows` and
        `columns` (N) of the positions whose next token has a label, `counts` (TokenCounts), and as lists the
        `lengths` of the rows in tokens, and `index`.
        """
        lengths = [len(example["input_ids"]) for example in examples]
        shape = (len(examples), max(lengths))
        fillers = {"input_ids": self.pad_id, "attention_mask": 0, "labels": IGNORED}
        arrays = {name: np.full(shape, filler, dtype=np.int64) for name, filler in fillers.items()}
        for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
            arrays["input_ids"][row, :length] = example["input_ids"]
            arrays["attention_mask"][row, :length] = 1
            arrays["labels"][row, :length] = example["labels"]
        batch: dict[str, Any] = {name: torch.from_numpy(values) for name, values in arrays.items()}
        batch["rows"], batch["columns"] = (batch["labels"][:, 1:] != IGNORED).nonzero(as_tuple=True)
        batch["counts"] = TokenCounts(sum(lengths), len(batch["rows"]), batch["labels"].numel())
        batch["lengths"] = lengths
        if "index" in examples[0]:
            batch["index"] = [example["index"] for example in examples]
        return batch
