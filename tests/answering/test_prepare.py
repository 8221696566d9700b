"""Prompts of rows: the opening that the run's own rows share, plain texts, and rows that cannot be asked."""

from pathlib import Path
from typing import Any

import pytest

from llmtune import recipe
from llmtune.answering.models import Prompts
from llmtune.answering.opening import Opening, choose_opening
from llmtune.answering.prepare import Prepared, Preparer
from llmtune.answering.request import Request
from llmtune.answering.rows import choose_form, read_rows, survey
from llmtune.data.encoding.rules import Rules
from llmtune.data.rows import Form
from llmtune.errors import RecipeError
from tests.support import tiny

TOOL = {"type": "function", "function": {"name": "add"}}
TURN = {"role": "user", "content": "2 plus 2?"}
TOOLS_SHOWN = "{{ (tools | map(attribute='function.name') | join) if tools }};" + tiny.CHATML
BARE = {"prompt": "one"}


def prepared(file: Path, opening: Opening, template: str | None = TOOLS_SHOWN) -> Prepared:
    """Prepare the rows of a file for a context of 40 tokens."""
    prompts = Prompts(tiny.tokenizer(template), {2}, {}, "learn", "")
    rows = read_rows(str(file), choose_form(str(file), Form()))
    return Preparer(prompts, Rules(60, "drop", "last_answer"), opening).prepare(rows, lambda amount=1: None)


def texts(done: Prepared) -> list[str]:
    """The prompts as text."""
    return [str(tiny.tokenizer().decode(ids)).removesuffix("<|im_start|>assistant\n") for ids in done.prompts]


@pytest.mark.parametrize(
    ("rows", "option", "expected"),
    [
        ([BARE], None, ["add;<|im_start|>system\nAdd.<|im_end|>\n"]),
        ([BARE], "", ["add;"]),
        ([BARE], "Yours.", ["add;<|im_start|>system\nYours.<|im_end|>\n"]),
        ([{**BARE, "system": "Own."}, BARE], None, ["add;<|im_start|>system\nOwn.<|im_end|>\n", "add;"]),
        ([{**BARE, "tools": [{**TOOL, "function": {"name": "sub"}}]}, BARE], "", ["sub;", ";"]),
    ],
)
def test_rows_without_an_opening_get_the_one_that_the_run_learned(
    tmp_path: Path, rows: list[Any], option: str | None, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "system", "content": "Add."}, TURN, {"role": "assistant", "content": "4"}]
    learned = tiny.write_rows(tmp_path / "train.jsonl", [{"messages": turns, "tools": [TOOL]}] * 3)
    settings = recipe.load(tiny.write_recipe(tmp_path / "recipe.json", tmp_path, learned))
    file = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    request = Request(str(file), tmp_path / "out.jsonl", system=option)
    opening = choose_opening(settings, survey(str(file), Form(), ()), request, has_template=True)
    assert texts(prepared(file, opening)) == [f"{start}<|im_start|>user\none<|im_end|>\n" for start in expected]
    said = "no row has a system prompt, so each gets the one of the run's rows: Add.\n" in capsys.readouterr().out
    assert said == (expected[0].endswith("Add.<|im_end|>\n"))
    with pytest.raises(RecipeError, match="--system: the tokenizer has no chat template"):
        choose_opening(settings, survey(str(file), Form(), ()), Request("a", Path("b.jsonl"), system="x"), False)


def test_a_text_is_continued_where_the_run_learned_texts_and_a_question_elsewhere(tmp_path: Path) -> None:
    file = tiny.write_rows(tmp_path / "rows.jsonl", [{"text": "Once"}])
    request, chats = Request(str(file), tmp_path / "out.jsonl"), tiny.write_rows(tmp_path / "a.jsonl", tiny.sums(3))
    found = []
    for learned in (file, chats):
        settings = recipe.load(tiny.write_recipe(tmp_path / "recipe.json", tmp_path, learned))
        opening = choose_opening(settings, survey(str(file), Form(), ()), request, has_template=True)
        found += texts(prepared(file, opening, tiny.CHATML))
    assert found == ["Once", "<|im_start|>user\nOnce<|im_end|>\n"]


def test_a_row_that_cannot_be_asked_has_an_error_and_the_others_go_on(tmp_path: Path) -> None:
    rejects = "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}" + tiny.CHATML
    answer = {"role": "assistant", "content": "4"}
    rows: list[dict[str, Any]] = [
        {"messages": [TURN, answer]},
        {"messages": [{**TURN, "content": "x" * 80}]},
        {"messages": [TURN, {**answer, "content": "4" * 50}]},  # the answer alone is too long to be scored
        {"messages": [{**TURN, "content": "no"}, answer]},
    ]
    done = prepared(tiny.write_rows(tmp_path / "rows.jsonl", rows), Opening(), rejects)
    assert done.errors == {
        1: "the prompt has 99 tokens, and the model's context 60",
        3: "the chat template rejects this conversation: not this",
    }
    assert list(done.truths) == [0]
    assert done.prompts[0] == done.prompts[2]
    assert "4" not in texts(done)[0].replace("plus 2", "")
    assert done.room(60) == 3  # 1.5 times the answer and its stop token
    with pytest.raises(RecipeError, match=r"no row can be asked: .*rows\.jsonl:1: the chat template rejects"):
        prepared(tiny.write_rows(tmp_path / "rows.jsonl", rows[3:]), Opening(), rejects)
