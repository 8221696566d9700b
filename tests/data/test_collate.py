"""Collation: batches are padded on the right; padding is masked and not learned."""

import torch

from llmtune.data.collate import Collator

LONG = {"input_ids": [1, 5, 6, 2], "labels": [-100, -100, 6, 2]}
SHORT = {"input_ids": [1, 2], "labels": [-100, 2], "id": "not a tensor"}


def test_pads_on_the_right_and_masks_padding() -> None:
    batch = Collator(0)([SHORT, LONG])
    assert batch["input_ids"].tolist() == [[1, 2, 0, 0], [1, 5, 6, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 2, -100, -100], [-100, -100, 6, 2]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_learns_the_stop_token_when_it_is_the_pad_token() -> None:
    batch = Collator(2)([SHORT, LONG])
    assert batch["labels"].tolist() == [[-100, 2, -100, -100], [-100, -100, 6, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["input_ids"].tolist() == [[1, 2, 2, 2], [1, 5, 6, 2]]


def test_leaves_examples_unchanged() -> None:
    before = {name: list(values) for name, values in LONG.items()}
    Collator(0)([LONG, LONG | {"input_ids": [1] * 9, "labels": [1] * 9}])
    assert before == LONG
