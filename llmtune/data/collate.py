"""Collates examples into a right-padded batch."""

from typing import Any

import torch

from llmtune.data.encode import IGNORED


class Collator:
    """Pads a list of {"input_ids", "labels"} on the right; an "index" of the examples is passed on.

    The pad token may be the stop token: a stop token of an example is still learned.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return LongTensors (B, T) input_ids, attention_mask (0 on padding) and labels (-100 on padding)."""
        width = max(len(example["input_ids"]) for example in examples)
        batch: dict[str, Any] = {
            "input_ids": [_pad(example["input_ids"], width, self.pad_id) for example in examples],
            "attention_mask": [_pad([1] * len(example["input_ids"]), width, 0) for example in examples],
            "labels": [_pad(example["labels"], width, IGNORED) for example in examples],
        }
        if "index" in examples[0]:
            batch["index"] = [example["index"] for example in examples]
        return {name: torch.tensor(values, dtype=torch.long) for name, values in batch.items()}


def _pad(values: list[int], width: int, filler: int) -> list[int]:
    return [*values, *[filler] * (width - len(values))]
