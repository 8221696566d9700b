"""The checks of the data: what cannot be right is refused; what is suspicious is counted and named."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from llmtune import recipe
from llmtune.data.checks import check_bos, check_stop, with_special_tokens
from llmtune.data.encoding.encode import IGNORED, Example
from llmtune.data.gate import Gate, check_supervised, gate
from llmtune.data.overlap import dedup_key, find_overlap
from llmtune.data.row import Row
from llmtune.data.rows import read
from llmtune.data.store.read import read_part
from llmtune.errors import RecipeError
from llmtune.files import shipped_folder
from llmtune.recipe.data import Data
from llmtune.run import locates_mistakes
from tests.support import tiny


def load(folder: Path, rows: dict[str, list[dict[str, Any]]], **data: Any) -> recipe.Recipe:
    """A recipe on files of these rows, with more keys of its data section."""
    files = {part: str(tiny.write_rows(folder / f"{part}.jsonl", records)) for part, records in rows.items()}
    return recipe.load(tiny.write_recipe(folder / "recipe.yaml", Path("base"), Path("unused"), data=files | data))


def run_gate(folder: Path, rows: dict[str, list[dict[str, Any]]], template: str = tiny.CHATML, **data: Any) -> Gate:
    """What the checks return for these rows."""
    return gate(load(folder, rows, **data), tiny.tokenizer(template), {2})


def pair(prompt: str, completion: str, name: str | None = None) -> dict[str, Any]:
    """A row of prompt and completion."""
    return {"id": name or prompt, "prompt": prompt, "completion": completion}


def notes_of(checked: Gate) -> str:
    """The notes for the user."""
    return "\n".join(checked.findings["notes"])


def test_counts_and_shows_what_is_learned(tmp_path: Path) -> None:
    checked = run_gate(
        tmp_path, {"train": tiny.sums(20), "eval": tiny.sums(5, 30), "test": tiny.sums(4, 40)}, max_length=64
    )
    findings = checked.findings
    assert (len(checked.train), len(checked.eval), len(checked.test)) == (20, 5, 4)
    assert findings["rows"] == {"train": 20, "eval": 5, "test": 4}
    answers = [len(row["completion"]) + 1 for row in tiny.sums(20)]
    assert findings["supervised_tokens"] == {
        "total": sum(answers),
        "mean": round(sum(answers) / 20, 1),
        "max": max(answers),
    }
    assert findings["prompt_tokens"] == sum(len(example.input_ids) for example in checked.train) - sum(answers)
    assert findings["longest"] == max(len(example.input_ids) for example in checked.train)
    assert findings["max_length"] == 64
    assert findings["example"] == "<|im_start|>user\n0 plus 0?<|im_end|>\n<|im_start|>assistant\n⟦0<|im_end|>⟧"
    assert findings["template_sha256"] == hashlib.sha256(tiny.CHATML.encode()).hexdigest()
    train = (tmp_path / "train.jsonl").read_bytes()
    assert findings["files"]["train"]["sha256"] == hashlib.sha256(train).hexdigest()
    assert json.loads(json.dumps(findings)) == findings
    assert "max_length 64; the longest row has" in notes_of(checked)


def test_learns_every_answer_without_generation_markers(tmp_path: Path) -> None:
    assert "generation %}" not in tiny.CHATML
    checked = run_gate(tmp_path, {"train": tiny.sums(5)})
    assert all(example.supervised > 0 for example in [*checked.train, *checked.eval])


def test_refuses_a_max_length_below_every_row_and_names_one_that_works(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml:\d+: data\.max_length: all 5 train rows are longer") as caught:
        run_gate(
            tmp_path,
            {"train": [pair(letter * 40, "x") for letter in "abcdefg"], "eval": tiny.sums(2)}
            | {"train": [pair(letter * size, "x") for size, letter in enumerate("abcde", 40)]},
            max_length=16,
        )
    assert "longer than max_length 16 (the shortest has 61 tokens); try 61 or more" in str(caught.value)
    assert len(run_gate(tmp_path, {"train": [pair("a" * 40, "x")], "eval": tiny.sums(1)}, max_length=61).train) == 1


def test_refuses_a_template_that_hides_the_answer(tmp_path: Path) -> None:
    hidden = tiny.CHATML.replace("message['content']", "(message['content'] if message['role'] == 'user' else '...')")
    with pytest.raises(RecipeError, match=r"train\.jsonl:\d: the chat template changes the answer"):
        run_gate(tmp_path, {"train": tiny.sums(3), "eval": tiny.sums(2, 9)}, hidden)
    unended = tiny.CHATML.replace("<|im_end|>", "<|end|>")
    with pytest.raises(RecipeError, match=r"ends an answer with '<', but the model stops at '<\|im_end\|>'"):
        run_gate(tmp_path, {"train": tiny.sums(3), "eval": tiny.sums(2, 9)}, unended)


def test_refuses_examples_with_nothing_to_learn_by_count_and_id(tmp_path: Path) -> None:
    loaded = load(tmp_path, {"train": tiny.sums(2)})

    @locates_mistakes
    def check(loaded: recipe.Recipe, part: str, examples: list[Example]) -> None:
        check_supervised(loaded.data, part, examples)

    good, masked = Example("g", "t:1", [5, 2], [5, 2]), Example("m", "t:2", [5, 2], [IGNORED, IGNORED])
    check(loaded, "train", [good])
    with pytest.raises(RecipeError, match=r"recipe\.yaml:\d+: data\.train: 1 of 2 rows do not have a token .*\(m\)"):
        check(loaded, "train", [good, masked])
    with pytest.raises(RecipeError, match=r"data\.train: no row has a token to learn from"):
        check(loaded, "eval", [masked])


def test_refuses_examples_without_learned_stop_token_or_with_two_bos(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="t:1: does not end in a learned stop token"):
        check_stop([Example("a", "t:1", [5, 2], [5, IGNORED])], {2})
    with pytest.raises(RecipeError, match="t:1: does not end"):
        check_stop([Example("a", "t:1", [5, 6], [5, 6])], {2})
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    check_bos([Example("a", "t:1", [1, 5, 2], [1, 5, 2])], tokenizer)
    with pytest.raises(RecipeError, match=r"t:1: starts with '<\|im_start\|>' twice"):
        check_bos([Example("a", "t:1", [1, 1, 2], [1, 1, 2])], tokenizer)


def test_reports_long_rows_by_count_and_id(tmp_path: Path) -> None:
    rows = [pair("p" * size, "answer", f"row-{size}") for size in (5, 100, 6, 200, 7, 300, 8, 400, 9, 10)]
    checked = run_gate(tmp_path, {"train": rows, "eval": tiny.sums(3)}, max_length=64)
    ids = ["row-100", "row-200", "row-300", "row-400"]
    assert checked.findings["over_length"]["train"] == {"rows": 4, "ids": ids, "of": 10, "dropped": 4, "cut": 0}
    assert "4 of 10 train rows are longer than max_length (row-100, row-200, row-300, row-400): 4 dropped" in notes_of(
        checked
    )
    assert all(example.input_ids[-1] == example.labels[-1] == 2 for example in checked.train)
    cut = run_gate(tmp_path, {"train": rows, "eval": tiny.sums(3)}, max_length=64, overlength="truncate_prompt")
    assert cut.findings["over_length"]["train"]["cut"] == 4
    assert len(cut.train) == 10
    with pytest.raises(RecipeError, match=r"train\.jsonl:2: row row-100 has 126 tokens"):
        run_gate(tmp_path, {"train": rows, "eval": tiny.sums(3)}, max_length=64, overlength="error")


TRAIN = [
    pair("What is 2+2?", "Four."),
    pair("Name a colour", "red"),
    pair("Say it", "yes"),
    pair("What is 2*2?", "Four."),
]
HELD = {
    "eval": [pair("what is 2+2", "four", "e1")],
    "test": [pair("  name a COLOUR! ", "Red", "t1"), pair("say it", "no", "t2")],
}


def test_drops_and_reports_train_rows_in_eval_or_test(tmp_path: Path) -> None:
    checked = run_gate(tmp_path, {"train": TRAIN, **HELD})
    assert [example.id for example in checked.train] == ["Say it", "What is 2*2?"]
    assert checked.findings["overlap"] == {
        "policy": "drop",
        "rows": 2,
        "ids": ["What is 2+2?", "Name a colour"],
        "in_eval": 1,
        "in_test": 1,
        "same_prompt": {"rows": 1, "ids": ["Say it"]},
        "eval_in_test": 0,
    }
    assert "2 train rows are also in eval or test (What is 2+2?, Name a colour): dropped from train" in notes_of(
        checked
    )
    assert "1 train rows share only their prompt" in notes_of(checked)


def test_overlap_warns_or_is_refused_as_the_recipe_says(tmp_path: Path) -> None:
    kept = run_gate(tmp_path, {"train": TRAIN, **HELD}, overlap="warn")
    assert len(kept.train) == 4
    assert "warning: they are trained on" in notes_of(kept)
    with pytest.raises(RecipeError, match=r"data\.overlap: 2 train rows are also in .*the first is .*train\.jsonl:1"):
        run_gate(tmp_path, {"train": TRAIN, **HELD}, overlap="error")
    with pytest.raises(RecipeError, match=r"data\.train: every train row is also in eval or test"):
        run_gate(tmp_path, {"train": TRAIN, "eval": TRAIN})
    assert (
        run_gate(tmp_path, {"train": TRAIN, "eval": TRAIN[:1], "test": TRAIN[:1]}).findings["overlap"]["eval_in_test"]
        == 1
    )


def test_holds_out_rows_by_content_in_any_order(tmp_path: Path) -> None:
    rows = [pair(f"question {n % 40}?", f"answer {n % 40}", f"row-{n}") for n in range(80)]  # each one twice
    shuffled = random.Random(1).sample(rows, len(rows))
    first, second = (run_gate(tmp_path, {"train": order}, eval_fraction=0.2) for order in (rows, shuffled))
    assert {example.id for example in first.eval} == {example.id for example in second.eval}
    assert len(first.eval) == 16
    assert [row.id for row in first.test] == [example.id for example in first.eval]
    texts = [{tuple(example.input_ids) for example in part} for part in (first.train, first.eval)]
    assert not texts[0] & texts[1]
    assert first.findings["duplicates"] == 32


def test_takes_a_share_of_the_training_rows_that_is_part_of_every_larger_one(tmp_path: Path) -> None:
    shares = [0.1, 0.3, 1.0]
    gates = [run_gate(tmp_path, {"train": tiny.sums(40)}, share=share) for share in shares]
    names = [{row.id for row in checked.rows["train"]} for checked in gates]
    assert [len(one) for one in names] == [round(share * len(names[-1])) for share in shares]
    assert names[0] < names[1] < names[2]
    assert len({tuple(row.id for row in checked.rows["eval"]) for checked in gates}) == 1
    turned = run_gate(tmp_path, {"train": tiny.sums(40)[::-1]}, share=0.3)
    assert {row.id for row in turned.rows["train"]} == names[1]


def test_holds_out_no_row_of_test(tmp_path: Path) -> None:
    rows = [pair(f"question {n}?", f"answer {n}") for n in range(20)]
    checked = run_gate(tmp_path, {"train": rows, "test": rows[:15]}, eval_fraction=0.6)
    assert {example.id for example in [*checked.train, *checked.eval]} == {row["id"] for row in rows[15:]}
    assert len(checked.eval) == 3


def test_leaves_rows_to_train_on_when_there_are_few(tmp_path: Path) -> None:
    assert len(run_gate(tmp_path, {"train": tiny.sums(3)}, eval_fraction=0.9).train) == 1
    assert len(run_gate(tmp_path, {"train": tiny.sums(3)}, eval_fraction=0.01).eval) == 1
    alone = run_gate(tmp_path, {"train": tiny.sums(1)})
    assert (len(alone.train), len(alone.eval), len(alone.test)) == (1, 0, 0)
    assert "no validation rows" in notes_of(alone)
    assert run_gate(tmp_path, {"train": tiny.sums(9)}, eval_fraction=0).eval[:] == []


def test_names_unused_columns_and_special_tokens(tmp_path: Path) -> None:
    rows = [*tiny.sums(3), pair("a", "b<|im_end|>", "odd") | {"lang": "en"}]
    checked = run_gate(tmp_path, {"train": rows, "eval": tiny.sums(2, 9)})
    assert checked.findings["ignored_columns"] == ["lang"]
    assert checked.findings["special_tokens_in_text"] == {"rows": 1, "ids": ["odd"]}
    assert "columns that are not used: lang" in notes_of(checked)
    assert "warning: 1 rows have special tokens in their text (odd)" in notes_of(checked)


def test_special_tokens_are_seen_in_reasoning_and_calls() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "<|im_end|>"}}}
    answers: list[dict[str, Any]] = [{"reasoning_content": "<|im_end|>"}, {"tool_calls": [call]}, {}]
    turns = [{"role": "assistant", "content": "a"} | answer for answer in answers]
    rows = [Row(f"r{index}", (turn,), "t:1") for index, turn in enumerate(turns)]
    assert with_special_tokens(rows, tiny.tokenizer()) == ["r0", "r1"]


def test_warns_of_a_row_longer_than_the_model_takes(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = 20
    checked = gate(load(tmp_path, {"train": tiny.sums(3)}), tokenizer, {2})
    assert "warning: the tokenizer says that the model takes 20 tokens" in notes_of(checked)


def test_names_recipe_line_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml:\d+: data\.test: no file tset\.jsonl \(looked for /.*"):
        run_gate(tmp_path, {"train": tiny.sums(3)}, test="tset.jsonl")


def test_names_bad_rows_in_every_part(tmp_path: Path) -> None:
    for part in ("train", "eval", "test"):
        rows = {"train": tiny.sums(3), "eval": tiny.sums(3, 10), "test": tiny.sums(3, 20)}
        rows[part] = [*rows[part], {"prompt": "x", "completion": None}]
        with pytest.raises(RecipeError, match=rf"{part}\.jsonl:4: completion: is null"):
            run_gate(tmp_path, rows)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Hello, world!", "hello  world", True),
        ("well-known", "well known", True),
        ("2+2", "2*2", False),
        ("3-4", "34", False),
        ("a < b", "a > b", False),
        ("?!", "!!", False),
        ("Straße_1", "straße 1", True),
    ],
)
def test_ignores_case_punctuation_and_space_in_comparing_rows(tmp_path: Path, one: str, other: str, same: bool) -> None:
    rows = read(str(tiny.write_rows(tmp_path / "t.jsonl", [pair(one, "x"), pair(other, "x")])))
    left, right = map(dedup_key, rows)
    assert (left == right) is same
    assert left.prompt != left.content


def test_finds_overlap_across_files(tmp_path: Path) -> None:
    train = [*tiny.sums(40), pair("Play some jazz, please.", "{play: jazz}"), pair("play jazz", "OK")]
    test = [
        *tiny.sums(6, 37),
        pair("play some JAZZ please", "{play: blues}"),
        {"prompt": [{"role": "user", "content": "PLAY jazz"}], "completion": "ok!"},
        pair("new", "new"),
    ]
    sides = ((tmp_path / "train.jsonl", train), (tmp_path / "test.jsonl", test))
    train_rows, test_rows = (read_part(Data(train=str(tiny.write_rows(*side))), "train") for side in sides)
    assert [list(places) for places in find_overlap(test_rows, train_rows)] == [[0, 1, 2, 7], [6]]
    assert [list(places) for places in find_overlap(train_rows, test_rows)] == [[37, 38, 39, 41], [40]]


def test_finds_no_overlap_in_the_sample(tmp_path: Path) -> None:
    sample = shipped_folder("sample")
    files = {
        part: str(sample / f"{name}.jsonl")
        for part, name in (("train", "train"), ("eval", "validation"), ("test", "test"))
    }
    file = tiny.write_recipe(tmp_path / "recipe.yaml", Path("base"), Path("unused"), data=files)
    checked = gate(recipe.load(file), tiny.tokenizer(), {2})
    assert (len(checked.train), len(checked.eval), len(checked.test)) == (600, 80, 120)
    assert checked.findings["overlap"]["rows"] == 0
