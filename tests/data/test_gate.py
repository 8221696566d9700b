"""Nothing is wrong with the data in silence: what cannot be right is refused, what is found is counted and named."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from llmtune import recipe
from llmtune.data import overlap
from llmtune.data.encode import IGNORED, Example
from llmtune.data.gate import Gate, check_bos, check_stop, check_supervised, gate
from llmtune.data.rows import read
from llmtune.errors import RecipeError
from llmtune.files import shipped_folder
from llmtune.run import locates_mistakes
from tests.support import ROOT, tiny

SHARED = ROOT.parent / "shared" / "data"


def load(folder: Path, rows: dict[str, list[dict[str, Any]]], **data: Any) -> recipe.Recipe:
    files = {part: str(tiny.write_rows(folder / f"{part}.jsonl", given)) for part, given in rows.items()}
    return recipe.load(tiny.write_recipe(folder / "recipe.yaml", Path("base"), Path("unused"), data=files | data))


def passed(folder: Path, rows: dict[str, list[dict[str, Any]]], template: str = tiny.CHATML, **data: Any) -> Gate:
    return gate(load(folder, rows, **data), tiny.tokenizer(template), {2})


def pair(prompt: str, completion: str, name: str | None = None) -> dict[str, Any]:
    return {"id": name or prompt, "prompt": prompt, "completion": completion}


def said(found: Gate) -> str:
    return "\n".join(found.findings["notes"])


def test_what_is_learned_is_counted_and_shown(tmp_path):
    found = passed(
        tmp_path, {"train": tiny.sums(20), "eval": tiny.sums(5, 30), "test": tiny.sums(4, 40)}, max_length=64
    )
    findings = found.findings
    assert (len(found.train), len(found.eval), len(found.test)) == (20, 5, 4)
    assert findings["rows"] == {"train": 20, "eval": 5, "test": 4}
    answers = [len(row["completion"]) + 1 for row in tiny.sums(20)]
    assert findings["supervised_tokens"] == {
        "total": sum(answers),
        "mean": round(sum(answers) / 20, 1),
        "max": max(answers),
    }
    assert findings["prompt_tokens"] == sum(len(example.input_ids) for example in found.train) - sum(answers)
    assert findings["longest"] == max(len(example.input_ids) for example in found.train)
    assert findings["max_length"] == 64
    assert findings["example"] == "<|im_start|>user\n0 plus 0?<|im_end|>\n<|im_start|>assistant\n⟦0<|im_end|>⟧"
    assert findings["template_sha256"] == hashlib.sha256(tiny.CHATML.encode()).hexdigest()
    train = (tmp_path / "train.jsonl").read_bytes()
    assert findings["files"]["train"]["sha256"] == hashlib.sha256(train).hexdigest()
    assert json.loads(json.dumps(findings)) == findings
    assert "max_length 64; the longest row has" in said(found)


def test_a_template_without_generation_markers_masks_nothing_away(tmp_path):
    assert "generation %}" not in tiny.CHATML
    found = passed(tmp_path, {"train": tiny.sums(5)})
    assert all(example.supervised > 0 for example in [*found.train, *found.eval])


def test_a_max_length_under_every_row_is_refused_with_the_nearest_valid(tmp_path):
    with pytest.raises(RecipeError, match=r"recipe\.yaml:\d+: data\.max_length: all 5 train rows are longer") as caught:
        passed(
            tmp_path,
            {"train": [pair(letter * 40, "x") for letter in "abcdefg"], "eval": tiny.sums(2)}
            | {"train": [pair(letter * size, "x") for size, letter in enumerate("abcde", 40)]},
            max_length=16,
        )
    assert "max_length 16 (shortest has 61 tokens); nearest valid: 61" in str(caught.value)
    assert len(passed(tmp_path, {"train": [pair("a" * 40, "x")], "eval": tiny.sums(1)}, max_length=61).train) == 1


def test_a_template_that_does_not_show_the_answer_is_refused(tmp_path):
    hidden = tiny.CHATML.replace("message['content']", "(message['content'] if message['role'] == 'user' else '...')")
    with pytest.raises(RecipeError, match=r"train\.jsonl:\d: the chat template rewrites the answer"):
        passed(tmp_path, {"train": tiny.sums(3), "eval": tiny.sums(2, 9)}, hidden)
    unended = tiny.CHATML.replace("<|im_end|>", "<|end|>")
    with pytest.raises(RecipeError, match=r"ends an answer with '<', but the model stops at '<\|im_end\|>'"):
        passed(tmp_path, {"train": tiny.sums(3), "eval": tiny.sums(2, 9)}, unended)


def test_examples_with_nothing_to_learn_are_refused_by_count_and_id(tmp_path):
    asked = load(tmp_path, {"train": tiny.sums(2)})
    good, masked = Example("g", "t:1", [5, 2], [5, 2]), Example("m", "t:2", [5, 2], [IGNORED, IGNORED])
    check_supervised(asked, "train", [good])
    with pytest.raises(RecipeError, match=r"recipe\.yaml:\d+: data\.train: 1 of 2 rows do not have a token .*\(m\)"):
        locates_mistakes(check_supervised)(asked, "train", [good, masked])
    with pytest.raises(RecipeError, match="no row has a token to learn from"):
        check_supervised(asked, "eval", [masked])


def test_examples_without_a_learned_stop_token_or_with_two_bos_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="t:1: does not end in a learned stop token"):
        check_stop([Example("a", "t:1", [5, 2], [5, IGNORED])], {2})
    with pytest.raises(RecipeError, match="t:1: does not end"):
        check_stop([Example("a", "t:1", [5, 6], [5, 6])], {2})
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    check_bos([Example("a", "t:1", [1, 5, 2], [1, 5, 2])], tokenizer)
    with pytest.raises(RecipeError, match=r"t:1: starts with '<\|im_start\|>' twice"):
        check_bos([Example("a", "t:1", [1, 1, 2], [1, 1, 2])], tokenizer)


def test_over_long_rows_are_reported_by_count_and_id(tmp_path):
    rows = [pair("p" * size, "answer", f"row-{size}") for size in (5, 100, 6, 200, 7, 300, 8, 400, 9, 10)]
    found = passed(tmp_path, {"train": rows, "eval": tiny.sums(3)}, max_length=64)
    ids = ["row-100", "row-200", "row-300", "row-400"]
    assert found.findings["over_length"]["train"] == {"rows": 4, "ids": ids, "of": 10, "dropped": 4, "cut": 0}
    assert "4 of 10 train rows over length (row-100, row-200, row-300, row-400): 4 dropped" in said(found)
    assert all(example.input_ids[-1] == example.labels[-1] == 2 for example in found.train)
    cut = passed(tmp_path, {"train": rows, "eval": tiny.sums(3)}, max_length=64, overlength="truncate_prompt")
    assert cut.findings["over_length"]["train"]["cut"] == 4
    assert len(cut.train) == 10
    with pytest.raises(RecipeError, match=r"train\.jsonl:2: row row-100 has 126 tokens"):
        passed(tmp_path, {"train": rows, "eval": tiny.sums(3)}, max_length=64, overlength="error")


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


def test_train_rows_that_stand_in_eval_or_test_are_dropped_and_reported(tmp_path):
    found = passed(tmp_path, {"train": TRAIN, **HELD})
    assert [example.id for example in found.train] == ["Say it", "What is 2*2?"]
    assert found.findings["overlap"] == {
        "policy": "drop",
        "rows": 2,
        "ids": ["What is 2+2?", "Name a colour"],
        "in_eval": 1,
        "in_test": 1,
        "same_prompt": {"rows": 1, "ids": ["Say it"]},
        "eval_in_test": 0,
    }
    assert "2 train rows also stand in eval or test (What is 2+2?, Name a colour): dropped from train" in said(found)
    assert "1 train rows share only their prompt" in said(found)


def test_overlap_can_be_kept_with_a_warning_or_be_an_error(tmp_path):
    kept = passed(tmp_path, {"train": TRAIN, **HELD}, overlap="warn")
    assert len(kept.train) == 4
    assert "warning: they are trained on" in said(kept)
    with pytest.raises(RecipeError, match=r"data\.overlap: 2 train rows also stand in .*the first is .*train\.jsonl:1"):
        passed(tmp_path, {"train": TRAIN, **HELD}, overlap="error")
    with pytest.raises(RecipeError, match=r"data\.train: every train row also stands in eval or test"):
        passed(tmp_path, {"train": TRAIN, "eval": TRAIN})
    assert (
        passed(tmp_path, {"train": TRAIN, "eval": TRAIN[:1], "test": TRAIN[:1]}).findings["overlap"]["eval_in_test"]
        == 1
    )


def test_rows_set_aside_are_chosen_by_content_not_by_order(tmp_path):
    rows = [pair(f"question {n % 40}?", f"answer {n % 40}", f"row-{n}") for n in range(80)]  # each one twice
    shuffled = random.Random(1).sample(rows, len(rows))
    first, second = (passed(tmp_path, {"train": given}, eval_fraction=0.2) for given in (rows, shuffled))
    assert {example.id for example in first.eval} == {example.id for example in second.eval}
    assert len(first.eval) == 16
    assert [row.id for row in first.test] == [example.id for example in first.eval]
    texts = [{tuple(example.input_ids) for example in part} for part in (first.train, first.eval)]
    assert not texts[0] & texts[1]
    assert first.findings["duplicates"] == 32


def test_rows_that_stand_in_test_are_not_set_aside_either(tmp_path):
    rows = [pair(f"question {n}?", f"answer {n}") for n in range(20)]
    found = passed(tmp_path, {"train": rows, "test": rows[:15]}, eval_fraction=0.6)
    assert {example.id for example in [*found.train, *found.eval]} == {row["id"] for row in rows[15:]}
    assert len(found.eval) == 3


def test_few_rows_still_leave_some_to_train_on(tmp_path):
    assert len(passed(tmp_path, {"train": tiny.sums(3)}, eval_fraction=0.9).train) == 1
    assert len(passed(tmp_path, {"train": tiny.sums(3)}, eval_fraction=0.01).eval) == 1
    alone = passed(tmp_path, {"train": tiny.sums(1)})
    assert (len(alone.train), alone.eval, alone.test) == (1, [], [])
    assert "no validation rows" in said(alone)
    assert passed(tmp_path, {"train": tiny.sums(9)}, eval_fraction=0).eval == []


def test_columns_and_special_tokens_that_a_user_may_not_expect_are_named(tmp_path):
    rows = [*tiny.sums(3), pair("a", "b<|im_end|>", "odd") | {"lang": "en"}]
    found = passed(tmp_path, {"train": rows, "eval": tiny.sums(2, 9)})
    assert found.findings["ignored_columns"] == ["lang"]
    assert found.findings["special_tokens_in_text"] == {"rows": 1, "ids": ["odd"]}
    assert "columns that are not used: lang" in said(found)
    assert "warning: 1 rows hold special tokens in their text (odd)" in said(found)


def test_a_row_longer_than_the_model_takes_is_warned_of(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = 20
    found = gate(load(tmp_path, {"train": tiny.sums(3)}), tokenizer, {2})
    assert "warning: the tokenizer says that the model takes 20 tokens" in said(found)


def test_a_missing_file_is_named_with_the_recipe_line(tmp_path):
    with pytest.raises(RecipeError, match=r"recipe\.yaml:\d+: data\.test: no file tset\.jsonl \(looked for /.*"):
        passed(tmp_path, {"train": tiny.sums(3)}, test="tset.jsonl")


def test_bad_rows_are_named_in_every_part(tmp_path):
    for part in ("train", "eval", "test"):
        rows = {"train": tiny.sums(3), "eval": tiny.sums(3, 10), "test": tiny.sums(3, 20)}
        rows[part] = [*rows[part], {"prompt": "x", "completion": None}]
        with pytest.raises(RecipeError, match=rf"{part}\.jsonl:4: completion: is null"):
            passed(tmp_path, rows)


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
def test_rows_are_the_same_but_for_case_punctuation_and_space(tmp_path, one, other, same):
    rows = read(str(tiny.write_rows(tmp_path / "t.jsonl", [pair(one, "x"), pair(other, "x")])))
    left, right = overlap.keys(rows)
    assert (left == right) is same
    assert overlap.keys(rows[:1])[0].prompt != left.content


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared data sets are not here")
def test_overlaps_of_published_sets_are_found():
    train, test = (overlap.keys(read(str(SHARED / "snips_slots" / f"{part}.jsonl"))) for part in ("train", "test"))
    whole, asked = overlap.shared(test, train)
    assert len(whole) + len(asked) >= 18


def test_the_sample_has_no_overlap_and_learns_every_answer(tmp_path):
    sample = shipped_folder("sample")
    files = {
        part: str(sample / f"{name}.jsonl")
        for part, name in (("train", "train"), ("eval", "validation"), ("test", "test"))
    }
    made = tiny.write_recipe(tmp_path / "recipe.yaml", Path("base"), Path("unused"), data=files)
    found = gate(recipe.load(made), tiny.tokenizer(), {2})
    assert (len(found.train), len(found.eval), len(found.test)) == (600, 80, 120)
    assert found.findings["overlap"]["rows"] == 0
