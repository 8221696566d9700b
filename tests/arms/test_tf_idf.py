"""A linear model over TF-IDF on rows whose answers are labels, and the reasons where it cannot be."""

from typing import Any

import pytest

from llmtune import recipe
from llmtune.arms.tf_idf import TfIdf, compare_tf_idf, score_tf_idf
from llmtune.data.row import Row
from tests.support import tiny

TOPICS = {"card": "my card is {} lost", "cash": "the machine gave {} no money", "rate": "what do {} euros cost"}

CALL: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [{}]}


def _row(question: str, answer: str, *before: dict[str, Any]) -> Row:
    turns = (*before, {"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Row(question, turns, question)


def _rows(count: int, first: int = 0) -> list[Row]:
    topics = list(TOPICS.items())
    return [_row(topics[n % 3][1].format(n), topics[n % 3][0]) for n in range(first, first + count)]


def test_predicts_labels_from_the_last_text_of_the_user() -> None:
    """Words of a topic decide; earlier turns, which are the same in all rows, do not; a truth in spaces is the same."""
    earlier = {"role": "user", "content": "my card is lost"}
    held_out = [*_rows(6, first=100), _row("the machine gave no money", " cash\n", earlier), _row("lost card", "rate")]
    result = compare_tf_idf(_rows(30), held_out)
    assert isinstance(result, TfIdf)
    assert result.answers == ["cash", "rate", "card", "cash", "rate", "card", "cash", "card"]
    assert result.scores == [1.0] * 7 + [0.0]
    assert (result.labels, result.trained, result.score) == (3, 30, 7 / 8)


@pytest.mark.parametrize(
    ("train", "held_out", "reason"),
    [
        (_rows(30), [], "no held-out row is a question"),
        ([Row("a", (), "a", text="a text")], _rows(3), "training rows are plain texts"),
        ([_row(f"{n}?", f"{n}") for n in range(30)], _rows(3), "answers do not repeat like labels"),
        ([Row("a", (CALL,), "a")] * 30, _rows(3), "some answers call tools"),
        ([_row(f"card {n}", "card") for n in range(30)], _rows(3), "all training rows have the same answer"),
        ([_row("?!", "a"), _row("!?", "b")] * 9, _rows(3), "questions have no words"),
    ],
)
def test_says_why_it_cannot_be(train: list[Row], held_out: list[Row], reason: str) -> None:
    """Rows without labels give a reason instead of a score."""
    assert compare_tf_idf(train, held_out) == reason


def test_takes_a_recipes_rows(tmp_path: Any) -> None:
    """It learns from the rows that are trained on, and answers the first `eval.limit` held-out ones."""
    rows = [{"prompt": row.messages[0]["content"], "completion": row.answer} for row in _rows(40)]
    train, test = (
        tiny.write_rows(tmp_path / name, some) for name, some in (("a.jsonl", rows[:30]), ("b.jsonl", rows[30:]))
    )
    data = {"train": str(train), "eval_fraction": 0.1, "test": str(test)}
    file = tiny.write_recipe(tmp_path / "r.json", tmp_path, train, data=data, eval={"suite": "quick", "limit": 4})
    result = score_tf_idf(recipe.load(file))
    assert isinstance(result, TfIdf)
    assert result.answers == ["card", "cash", "rate", "card"]
    assert result.scores == [1.0] * 4
    assert result.trained < 30
