"""Examples -> a right-padded batch."""

from typing import Any

import torch

from llmtune.data.encode import IGNORED


class Collator:
    """Pads a list of {"input_ids", "labels"} on the right; the pad token may be the stop token, which stays learned.

    Where examples have an "index", the place of each in the data, the batch has it too.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """LongTensors (B, T) input_ids, attention_mask (0 on padding) and labels (-100 on padding)."""
        width = max(len(example["input_ids"]) for example in examples)
        ids = [_padded(example["input_ids"], width, self.pad_id) for example in examples]
        mask = [_padded([1] * len(example["input_ids"]), width, 0) for example in examples]
        labels = [_padded(example["labels"], width, IGNORED) for example in examples]
        named: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if "index" in examples[0]:
            named["index"] = [example["index"] for example in examples]
        return {name: torch.tensor(values, dtype=torch.long) for name, values in named.items()}


def _padded(values: list[int], width: int, filler: int) -> list[int]:
    return [*values, *[filler] * (width - len(values))]
