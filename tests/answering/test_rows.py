"""Rows that are to be answered: every format of `data`, with and without an answer, and where the answer goes."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmtune.answering.request import Request
from llmtune.answering.rows import choose_form, read_rows, survey, with_answer
from llmtune.data.rows import Form
from llmtune.errors import RecipeError

ASK, TOLD = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}
HUMAN, GPT = {"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}
CALL = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}
RESULT = {"role": "tool", "content": "7"}


@pytest.mark.parametrize(
    ("record", "prompt", "place"),
    [
        ({"messages": [ASK, TOLD]}, ["user a?"], None),
        ({"messages": [ASK]}, ["user a?"], "messages"),
        ({"messages": [ASK, {**TOLD, "content": ""}]}, ["user a?"], "messages"),
        ({"messages": [ASK, CALL, RESULT]}, ["user a?", "assistant ", "tool 7"], "messages"),
        ({"messages": [ASK, CALL]}, ["user a?"], None),
        ({"messages": [ASK], "system": "Be."}, ["system Be.", "user a?"], "messages"),
        ({"conversations": [HUMAN, GPT]}, ["user a?"], None),
        ({"conversations": [HUMAN, GPT, HUMAN]}, ["user a?", "assistant b", "user a?"], "conversations"),
        ({"prompt": "a?", "completion": "b", "mine": 1}, ["user a?"], None),
        ({"prompt": "a?", "mine": 1}, ["user a?"], "completion"),
        ({"prompt": [ASK], "completion": None}, ["user a?"], "completion"),
        ({"prompt": "a?", "chosen": "b", "rejected": "c"}, ["user a?"], None),
        ({"instruction": "a?", "input": "x", "output": " "}, ["user a?\nx"], "output"),
        ({"instruction": "a?"}, ["user a?"], "output"),
        ({"question": "a?"}, ["user a?"], "completion"),
        ({"text": "a?"}, [], ""),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_reads_rows_of_every_format_and_knows_where_their_answer_goes(
    tmp_path: Path, record: dict[str, Any], prompt: list[str], place: str | None
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(record))
    (one,) = read_rows(str(file), choose_form(str(file), Form()))
    assert [f"{turn['role']} {turn['content']}" for turn in one.row.prompt] == prompt
    assert (one.record, one.is_answered) == (record, place is None)
    assert one.place == (place or "")
    assert with_answer(record, one.place, " \n") == record
    filled = with_answer(record, one.place, "z")
    if one.place:  # the row is one to train on now
        file.write_text(json.dumps(filled))
        (again,) = read_rows(str(file), choose_form(str(file), Form()))
        assert (again.is_answered, again.row.answer, again.row.prompt) == (True, "z", one.row.prompt)
    else:
        assert filled == record


def test_reads_columns_as_the_recipe_names_them(tmp_path: Path) -> None:
    own, file = Form("prompt_completion", {"prompt": "{q}, {n}", "completion": "label"}), tmp_path / "rows.csv"
    file.write_text("q,n,label\na,1,\nb,2,yes\n")
    form = choose_form(str(file), own)
    asked = list(read_rows(str(file), form))
    assert form == own
    assert [(one.row.prompt[0]["content"], one.is_answered, one.place) for one in asked] == [
        ("a, 1", False, "label"),
        ("b, 2", True, ""),
    ]
    file.write_text("q,n\na,1\n")
    assert [one.place for one in read_rows(str(file), choose_form(str(file), own))] == ["label"]
    file.write_text("question\na\n")  # not the recipe's columns
    assert [one.row.prompt[0]["content"] for one in read_rows(str(file), choose_form(str(file), own))] == ["a"]


def test_each_line_of_a_text_file_is_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  two \n")
    asked = list(read_rows(str(file), choose_form(str(file), Form())))
    assert [(one.record, one.row.where) for one in asked] == [
        ({"prompt": "one"}, f"{file}:1"),
        ({"prompt": "two"}, f"{file}:3"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "rows.jsonl: is empty: it has no rows"),
        ('{"foo": 1, "bar": 2}', "rows.jsonl:1: holds no prompt: its columns are foo, bar; prompt, instruction, "),
        ('{"completion": "b"}', "rows.jsonl:1: holds no prompt: its columns are completion; "),
        ("[1]", "rows.jsonl:1: holds a list; an object with messages"),
        ('{"prompt": ""}', "rows.jsonl:1: prompt: is empty; text is expected"),
        ('{"messages": [{"role": "usr", "content": "a"}]}', "rows.jsonl:1: messages[0].role: is 'usr', not one of"),
        ('{"prompt": "a"}\n{"messages": []}', "rows.jsonl:2: is chat, but "),
        ('{"prompt": "a"}\n{"prompt": "a", "tuned": 1}', "rows.jsonl:2: has a column 'tuned', into which answers"),
        ('{"prompt": "a"', "rows.jsonl:1: not JSON: "),
    ],
)
def test_a_row_that_cannot_be_asked_is_one_line_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        survey(str(file), choose_form(str(file), Form()), ("tuned",))
    assert str(caught.value).startswith(f"{file.parent}/{message}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "tund"}, "--model tund: is not one of tuned, base, both; did you mean 'tuned'?"),
        ({"temperature": -1.0}, "--temperature: is a number from 0 on, not -1.0"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p: is a number above 0, up to 1, not 0.0"),
        ({"temperature": 1.0, "top_k": -1}, "--top-k: is a whole number from 0 on, 0 for all tokens, not -1"),
        ({"max_new_tokens": 0}, "--max-new-tokens: is a whole number from 1 on, not 0"),
        ({"top_k": 5}, "--top-k: is for drawn answers; add --temperature 1, or leave it out"),
        ({"seed": 5}, "--seed: is for drawn answers; add --temperature 1, or leave it out"),
        ({"samples": 0, "temperature": 1.0}, "--samples 0: a whole number from 1 on is expected"),
        ({"samples": 3}, "--samples 3: without --temperature all answers to a row are the same; add --temperature 1"),
        ({"out": Path("a.csv")}, "a.csv: answers are JSON lines; name the file a.jsonl"),
        ({"out": Path("rows.jsonl")}, "rows.jsonl: would replace the rows that are read; give another -o"),
        ({"out": Path("link.jsonl")}, "link.jsonl: would replace the rows that are read; give another -o"),
        ({"out": Path("folder.jsonl")}, "folder.jsonl: is a folder; name a file in it"),
    ],
)
def test_options_that_make_no_sense_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.jsonl").mkdir()
    Path("rows.jsonl").write_text("")
    Path("link.jsonl").symlink_to("rows.jsonl")
    with pytest.raises(RecipeError) as caught:
        Request("rows.jsonl", **{"out": Path("out.jsonl"), **options})
    assert str(caught.value) == message
