"""The shipped sample: well annotated, and its test rows use phrasings and values that do not occur in train."""

import json
import re
from typing import Any

import pytest

from tests.support import ROOT

SAMPLE = ROOT / "llmtune" / "sample"
SIZES = {"train": 600, "validation": 80, "test": 120}


def rows(part: str) -> list[tuple[str, dict[str, Any]]]:
    """Each row's order and its true answer."""
    read = [json.loads(line)["messages"] for line in (SAMPLE / f"{part}.jsonl").read_text().splitlines()]
    assert all([turn["role"] for turn in row] == ["system", "user", "assistant"] for row in read)
    return [(row[1]["content"], json.loads(row[2]["content"])) for row in read]


def skeleton(text: str, answer: dict[str, Any]) -> str:
    """The order with each value replaced by its slot's name."""
    for slot, value in sorted(answer["slots"].items(), key=lambda item: -len(item[1])):
        text = text.replace(value, f"<{slot}>", 1)
    return re.sub(r"[^\w<> ]", "", text.lower())


def runs_of_five(text: str) -> set[tuple[str, ...]]:
    """Every five words in a row."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}


@pytest.mark.parametrize("part", SIZES)
def test_every_value_stands_in_its_order_word_for_word(part: str) -> None:
    found = rows(part)
    assert len(found) == SIZES[part]
    for text, answer in found:
        assert set(answer) == {"intent", "slots"}
        assert all(value in text for value in answer["slots"].values()), text


def test_test_rows_share_no_value_with_train() -> None:
    values = {part: {value.lower() for _, answer in rows(part) for value in answer["slots"].values()} for part in SIZES}
    assert not values["test"] & values["train"]


def test_test_rows_share_no_phrasing_with_train() -> None:
    train, test = rows("train"), rows("test")
    assert not {skeleton(*row) for row in test} & {skeleton(*row) for row in train}
    seen = set().union(*(runs_of_five(text) for text, _ in train))
    assert not [text for text, _ in test if runs_of_five(text) & seen]


def test_no_phrasing_stands_twice() -> None:
    for part in SIZES:
        skeletons = [skeleton(*row) for row in rows(part)]
        assert len(set(skeletons)) == len(skeletons)


def test_every_intent_of_the_test_is_learned() -> None:
    intents = {part: {answer["intent"] for _, answer in rows(part)} for part in SIZES}
    assert intents["test"] == intents["train"]
