"""The shipped sample: values are quoted from the orders; test shares no phrasing and no value with train."""

import json
import re
from typing import Any

import pytest

from tests.support import ROOT

SAMPLE = ROOT / "llmtune" / "sample"
SIZES = {"train": 600, "validation": 80, "test": 120}


def rows(part: str) -> list[tuple[str, dict[str, Any]]]:
    """Each row's order and its true answer."""
    messages = [json.loads(line)["messages"] for line in (SAMPLE / f"{part}.jsonl").read_text().splitlines()]
    assert all([turn["role"] for turn in row] == ["system", "user", "assistant"] for row in messages)
    return [(row[1]["content"], json.loads(row[2]["content"])) for row in messages]


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
def test_quotes_every_value_from_its_order(part: str) -> None:
    orders = rows(part)
    assert len(orders) == SIZES[part]
    for text, answer in orders:
        assert set(answer) == {"intent", "slots"}
        assert all(value in text for value in answer["slots"].values()), text


def test_shares_no_value_between_test_and_train() -> None:
    values = {part: {value.lower() for _, answer in rows(part) for value in answer["slots"].values()} for part in SIZES}
    assert not values["test"] & values["train"]


def test_shares_no_phrasing_between_test_and_train() -> None:
    train, test = rows("train"), rows("test")
    assert not {skeleton(*row) for row in test} & {skeleton(*row) for row in train}
    seen = set().union(*(runs_of_five(text) for text, _ in train))
    assert not [text for text, _ in test if runs_of_five(text) & seen]


def test_repeats_no_phrasing() -> None:
    for part in SIZES:
        skeletons = [skeleton(*row) for row in rows(part)]
        assert len(set(skeletons)) == len(skeletons)


def test_trains_on_every_intent_of_the_test() -> None:
    intents = {part: {answer["intent"] for _, answer in rows(part)} for part in SIZES}
    assert intents["test"] == intents["train"]
