"""What a data set is, is the same to `init`, `plan --methods` and `compare`."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from llmtune import recipe
from llmtune.advising.facts import answers_of, count_labels, kind_of
from llmtune.cli.summary import summarize
from llmtune.comparing.survey import decides
from llmtune.data.gate import Gate
from llmtune.data.row import Row
from llmtune.data.store.read import read_part
from tests.support import tiny

JSON_ROW = Row("r", ({"role": "user", "content": "q"}, {"role": "assistant", "content": '{"a": 1}'}), "t:1")


@pytest.mark.parametrize(
    ("answers", "kind", "labels"),
    [
        ([f"label {n % 10}" for n in range(30)], "labels", 10),
        ([f"label {n % 250}" for n in range(1250)], "text", 0),
        ([f'{{"answer": {n % 2}}}' for n in range(30)], "json", 0),
        ([f"text {n}" for n in range(30)], "text", 0),
    ],
    ids=["labels", "too many labels", "JSON that repeats", "text"],
)
def test_kind_of_rows_is_decided_in_one_way(tmp_path: Path, answers: list[str], kind: str, labels: int) -> None:
    rows = [{"prompt": f"question {n}?", "completion": answer} for n, answer in enumerate(answers)]
    file = tiny.write_rows(tmp_path / "train.jsonl", rows)
    summary = summarize(str(file))
    assert (summary.kind, summary.labels) == (kind, labels)
    loaded = recipe.load(tiny.write_recipe(tmp_path / "recipe.yaml", Path("base"), file))
    trained = read_part(loaded.data, "train")
    facts = answers_of(trained)
    assert (kind_of(facts), count_labels(facts)) == (kind, labels)
    held_out: list[Sequence[Row]] = [trained, [JSON_ROW]]
    assert [decides(loaded, Gate([], [], test, [], {}, {"train": trained}))[1] for test in held_out] == [kind] * 2
