"""Collates examples into a right-padded batch."""

from typing import Any

import numpy as np
import torch

from llmtune.data.encode import IGNORED


class Collator:
    """Pads a list of {"input_ids", "labels"} on the right; an "index" of the examples is passed on.

    The pad token may be the stop token: a stop token of an example is still learned. Arrays take a hundredth of the
    time of lists.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return LongTensors (B, T) input_ids, attention_mask (0 on padding) and labels (-100 on padding)."""
        lengths = [len(example["input_ids"]) for example in examples]
        shape = (len(examples), max(lengths))
        fillers = {"input_ids": self.pad_id, "attention_mask": 0, "labels": IGNORED}
        batch = {name: np.full(shape, filler, dtype=np.int64) for name, filler in fillers.items()}
        for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
            batch["input_ids"][row, :length] = example["input_ids"]
            batch["attention_mask"][row, :length] = 1
            batch["labels"][row, :length] = example["labels"]
        if "index" in examples[0]:
            batch["index"] = np.array([example["index"] for example in examples], dtype=np.int64)
        return {name: torch.from_numpy(values) for name, values in batch.items()}
