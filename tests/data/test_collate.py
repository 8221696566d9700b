"""Collation: batches are padded on the right; padding is masked and not learned."""

import torch

from llmtune.data.batches.collate import Collator, TokenCounts

LONG = {"input_ids": [1, 5, 6, 2], "labels": [-100, -100, 6, 2]}
SHORT = {"input_ids": [1, 2], "labels": [-100, 2], "id": "not a tensor"}


def test_pads_on_the_right_and_masks_padding() -> None:
    batch = Collator(0)([SHORT, LONG])
    assert batch["input_ids"].tolist() == [[1, 2, 0, 0], [1, 5, 6, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 2, -100, -100], [-100, -100, 6, 2]]
    assert {value.dtype for value in batch.values() if isinstance(value, torch.Tensor)} == {torch.int64}


def test_tells_the_host_where_labels_are_and_how_many() -> None:
    batch = Collator(0)([SHORT | {"index": 7}, LONG | {"index": 3}])
    assert list(zip(batch["rows"].tolist(), batch["columns"].tolist(), strict=True)) == [(0, 0), (1, 1), (1, 2)]
    assert batch["counts"] == TokenCounts(seen=6, supervised=3, slots=8)
    assert (batch["lengths"], batch["index"]) == ([2, 4], [7, 3])


def test_learns_the_stop_token_when_it_is_the_pad_token() -> None:
    batch = Collator(2)([SHORT, LONG])
    assert batch["labels"].tolist() == [[-100, 2, -100, -100], [-100, -100, 6, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["input_ids"].tolist() == [[1, 2, 2, 2], [1, 5, 6, 2]]


def test_leaves_examples_unchanged() -> None:
    before = {name: list(values) for name, values in LONG.items()}
    Collator(0)([LONG, LONG | {"input_ids": [1] * 9, "labels": [1] * 9}])
    assert before == LONG
