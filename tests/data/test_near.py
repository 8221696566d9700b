"""Near duplicates: the same pairs as comparing every two sets, and what is told of them."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtune import recipe
from llmtune.data.gate import gate
from llmtune.data.near import duplicates, shingles
from llmtune.data.near.duplicates import near_duplicates
from llmtune.data.near.notes import near_notes
from llmtune.data.near.shingles import hash_shingles, shingle_sets
from llmtune.data.near.texts import RowTexts, suite_documents
from llmtune.data.row import Row
from llmtune.recipe.suite import load_suite
from tests.support import tiny
from tests.support.suites import mine

WORDS = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("ano", "elu", "iri", "oka", "uto")]


def sentences(count: int, words: int = 60, seed: int = 0) -> list[str]:
    """Random texts."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=words)) for _ in range(count)]


def changed(text: str, words: int) -> str:
    """The text with other words at its end."""
    kept = text.split()
    return " ".join([*kept[: len(kept) - words], *(f"{kept[number]}{kept[number + 1]}" for number in range(words))])


def named(texts: list[str]) -> list[tuple[str, str]]:
    """The texts with their places as ids."""
    return [(f"row-{number}", text) for number, text in enumerate(texts)]


def sets(texts: list[str]) -> list[set[tuple[str, ...]]]:
    """The five-word shingles of texts."""
    words = [text.split() for text in texts]
    return [{tuple(one[at : at + 5]) for at in range(len(one) - 4)} for one in words]


def near(texts: list[str], others: list[str] | None = None) -> list[str]:
    """The ids of texts with a Jaccard similarity of 0.8 to one of the others, or to an earlier one."""
    own, all_others = sets(texts), sets(others or texts)
    pairs = ((number, own[number], all_others[: None if others else number]) for number in range(len(own)))
    return [f"row-{number}" for number, one, some in pairs if any(len(one & x) / len(one | x) >= 0.8 for x in some)]


def test_finds_the_pairs_that_comparing_every_two_texts_finds() -> None:
    texts = sentences(40)
    train = [*texts, *(changed(text, number % 16) for number, text in enumerate(texts))]
    test = [changed(text, 3) for text in texts[:10]] + sentences(10, seed=1)
    result = near_duplicates(named(train), {"test": named(test)})
    earlier, across = near(train), near(train, test)
    assert (result["train"]["rows"], result["train"]["ids"]) == (len(earlier), earlier[:20])
    assert (result["test"]["rows"], result["test"]["ids"]) == (len(across), across[:20])
    assert (len(earlier), len(across)) == (21, 17)
    assert result["checked"] == {"train": {"rows": 80, "of": 80}, "test": {"rows": 20, "of": 20}}
    assert result == near_duplicates(named(train), {"test": named(test)})


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("Set an alarm for seven o'clock!", "set an ALARM, for seven o clock", True),
        ("yes", "Yes.", True),
        ("yes", "yes please", False),
        ("turn on the light", "turn off the light", False),
        ("???", "!!!", False),
        ("請把客廳的燈打開好嗎謝謝你", "請把客廳的燈打開好嗎謝謝您們", False),
        ("請把客廳的燈打開好嗎謝謝你", "請把客廳的燈打開好嗎謝謝你。", True),
        ("", "", True),
    ],
)
def test_compares_words_and_short_texts_as_a_whole(first: str, second: str, same: bool) -> None:
    assert np.array_equal(hash_shingles(first), hash_shingles(second)) == same
    assert near_duplicates(named([first, second]), {})["train"]["rows"] == same


def test_text_without_spaces_is_compared_by_its_letters() -> None:
    long = "".join(chr(0x4E00 + number) for number in range(60))
    assert near_duplicates(named([long, long[:-2]]), {})["train"]["ids"] == ["row-1"]


def test_an_instruction_that_every_row_has_makes_no_two_rows_the_same() -> None:
    instruction = f"Answer the question of a customer: {sentences(1, seed=2)[0]}: "
    texts = [instruction + text for text in sentences(200, words=5)]
    assert near_duplicates(named([*texts, texts[7]]), {})["train"]["ids"] == ["row-200"]
    assert near_duplicates(named([instruction] * 30), {})["train"]["rows"] == 29


def test_a_long_text_is_permuted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = sentences(1, words=700)
    whole = shingle_sets([text], 1, np.empty(0, np.uint64)).signatures
    monkeypatch.setattr(shingles, "_PIECE", 100)
    assert np.array_equal(shingle_sets([text], 1, np.empty(0, np.uint64)).signatures, whole)


def test_of_a_large_part_drawn_rows_are_compared_and_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MOST_ROWS", 50)
    result = near_duplicates(named(["the same five words here"] * 80), {"test": named(["another"])})
    assert result["train"]["rows"] == 49
    line = "near duplicates are looked for among drawn rows: 50 of 80 rows of train"
    assert near_notes(result, ", ".join)[-1] == line
    monkeypatch.setattr(duplicates, "MOST_CHARACTERS", 24 * 10)
    assert near_duplicates(named(["the same five words here"] * 80), {})["checked"]["train"]["rows"] == 10


def test_takes_every_part_of_a_row() -> None:
    call = {"type": "function", "function": {"name": "play", "arguments": {"artist": "Nina"}}}
    turns = ({"role": "user", "content": "Play Nina"}, {"role": "assistant", "content": "", "tool_calls": [call]})
    rows = [Row("a", turns, "a:1"), Row("b", (), "a:2", text="A plain text")]
    assert [*RowTexts(rows)] == [("a", f"Play Nina\n{json.dumps([call])}"), ("b", "A plain text")]
    assert [*RowTexts(rows, questions=True)[:1]] == [("a", "Play Nina")]


def test_check_tells_what_train_shares_with_eval_test_and_the_suite(tmp_path: Path) -> None:
    texts = sentences(40)
    rows = [{"id": f"r{number}", "prompt": text, "completion": "yes"} for number, text in enumerate(texts)]

    def nearly(*numbers: int) -> list[dict[str, Any]]:
        return [{"prompt": changed(texts[number], 2), "completion": "yes"} for number in numbers]

    parts = {"train": [*rows, {**nearly(5)[0], "id": "again"}], "eval": nearly(1, 2), "test": nearly(3)}
    data: dict[str, Any] = {
        part: str(tiny.write_rows(tmp_path / f"{part}.jsonl", some)) for part, some in parts.items()
    }
    asked = [{"passage": changed(texts[number], 1), "question": "is it", "label": 1} for number in (8, 9)]
    boolq = tiny.write_rows(tmp_path / "boolq.jsonl", asked)
    mine(tmp_path)
    tiny.write_rows(tmp_path / "rows.jsonl", [{"q": texts[11], "a": 1}])
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"tasks: [held_out, {{task: boolq, rows: {boolq}}}, task.yaml, arc_easy]")
    loaded = recipe.load(tiny.write_recipe(tmp_path / "recipe.yaml", Path("base"), Path("unused"), data=data))
    documents = suite_documents(load_suite(str(suite)))
    findings = gate(loaded, tiny.tokenizer(), {2}, documents=documents).findings
    result = findings["near_duplicates"]
    told = {part: result[part]["ids"] for part in ("train", "eval", "test", "suite")}
    assert told == {"train": ["again"], "eval": ["r1", "r2"], "test": ["r3"], "suite": ["r8", "r9", "r11"]}
    assert result["not_at_hand"] == ["arc_easy"]
    assert findings["rows"]["train"] == 41
    lines = [
        "1 train rows are nearly the same as an earlier one, or exactly so (again)",
        "warning: 2 train rows are nearly the same as rows of eval (r1, r2)",
        "warning: 1 train rows are nearly the same as rows of test (r3)",
        "warning: 3 train rows are nearly the same as documents of the suite (r8, r9, r11)",
    ]
    assert findings["notes"][-4:] == lines
    assert json.loads(json.dumps(result)) == result
    assert "near_duplicates" not in gate(loaded, tiny.tokenizer(), {2}).findings
    alone = recipe.load(tmp_path / "recipe.yaml", ["data.test=null"])
    assert "test" not in gate(alone, tiny.tokenizer(), {2}, documents=documents).findings["near_duplicates"]
    assert documents.texts[0][0] == "boolq:1"
